"""Guided decoding: which tokens keep an answer within a grammar.

llguidance does the work; grammars are compiled in the background.

Its parser computes masks lazily and within limits (https://github.com/guidance-ai/llguidance), so that
neither a grammar nor a step of it can keep others waiting, and what it cannot keep of a JSON schema it
refuses by name.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from pagetide.engine.grammars import first_line, grammar_of
from pagetide.text.tokens import Vocabulary
from pagetide.types import Guide, RequestError

_WORKERS = 4  # large grammars do not keep small ones waiting
_STACK_BYTES = (
    512 * 2**20
)  # the compiler follows chains of references by recursion; only what is used becomes memory
# About 7 ms for a mask, and 1 to 2 KB of memory for each state, by the documentation of
# llguidance.LLParserLimits.
_STEP_LEXER_FUEL, _MAX_LEXER_STATES = 100_000, 10_000


class GuideState(Protocol):
    """Where one sequence stands in its grammar."""

    def fill(self, mask: np.ndarray) -> None:
        """Writes which tokens may come next: bit i of word w of int32 [vocabulary / 32] is token 32 * w + i.

        Raises RequestError if nothing may, or the grammar has become too large.
        """

    def advance(self, token: int) -> None:
        """Takes a token that was allowed. Raises RequestError if the grammar has become too large."""


class GuideCompiler(Protocol):
    """Turns guides into the beginnings of sequences."""

    def compile(self, guide: Guide) -> Future[Callable[[], GuideState]]:
        """Returns at once; the future's result makes a new state, or it raises RequestError."""


class GrammarCompiler:
    """Compiles each request's grammar anew, about a millisecond: copies share their limits, and one request
    could use up another's.

    end_ids: what may follow a complete answer.
    """

    def __init__(self, vocabulary: Vocabulary, vocab_size: int, end_ids: Iterable[int]):
        self._vocabulary = vocabulary
        self._vocab_size = vocab_size
        self._end_ids = sorted(end_ids)
        self._workers = ThreadPoolExecutor(_WORKERS, "pagetide-grammar")

    def compile(self, guide: Guide) -> Future[Callable[[], GuideState]]:
        """Compiles on a thread beside the engine's. The result makes one state for each sequence; it raises
        RequestError.
        """
        before = threading.stack_size(_STACK_BYTES)
        try:
            return self._workers.submit(self._compile, guide)  # starts its threads here
        finally:
            threading.stack_size(before)

    @cached_property
    def _tokenizer(self) -> Any:
        from llguidance import LLTokenizer  # only guided requests need it

        tokens: Any = _Tokens(self._vocabulary, self._vocab_size, self._end_ids[0])
        return LLTokenizer(tokens, n_vocab=self._vocab_size, eos_token=self._end_ids)

    def _compile(self, guide: Guide) -> Callable[[], GuideState]:
        from llguidance import LLMatcher, LLParserLimits

        if not self._end_ids:
            raise RequestError(
                "guided decoding needs a model with an end-of-sequence token, and this one has none"
            )
        limits = LLParserLimits(step_lexer_fuel=_STEP_LEXER_FUEL, max_lexer_states=_MAX_LEXER_STATES)
        matcher = LLMatcher(self._tokenizer, grammar_of(guide), log_level=0, limits=limits)
        if matcher.is_error():
            raise RequestError(
                f"guided_decoding_guide is no valid {guide.kind}: {first_line(matcher.get_error())}"
            )
        # Whether it accepts anything shows at its first token.
        LlGuidanceState(matcher, guide.kind).fill(np.empty(-(-self._vocab_size // 32), np.int32))
        return lambda: LlGuidanceState(matcher.deep_copy(), guide.kind)


class _Tokens:
    """A vocabulary as llguidance takes it."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary, size: int, end_id: int):
        self._vocabulary = vocabulary
        self.eos_token_id = end_id
        # Special tokens have no bytes here: no text needs them.
        self.tokens = (vocabulary.shown + [b""] * size)[:size]
        self.special_token_ids: list[int] = []

    def __call__(self, text: bytes | str) -> list[int]:
        return list(
            self._vocabulary.encode(text if isinstance(text, str) else text.decode("utf-8", "replace"))
        )


class LlGuidanceState:
    """A matcher and its place."""

    def __init__(self, matcher: Any, kind: str):
        self._matcher = matcher
        self._kind = kind

    def fill(self, mask: np.ndarray) -> None:
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        self._check()

    def advance(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if not self._matcher.is_error():
            return
        reason = first_line(self._matcher.get_error())
        if reason.startswith("NoExtension"):
            raise RequestError(
                f"guided_decoding_guide ({self._kind}): this grammar accepts nothing, or nothing "
                "that can follow the answer so far"
            )
        raise RequestError(f"guided_decoding_guide ({self._kind}) is too large for guided decoding: {reason}")
