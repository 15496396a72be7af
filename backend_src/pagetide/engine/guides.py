"""Guided decoding: which tokens keep an answer within a grammar. xgrammar (arXiv:2411.15100) does the work, compiled in the background."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, lru_cache
from typing import Any, Protocol

import numpy as np

from pagetide.text.tokens import Vocabulary
from pagetide.types import Guide, RequestError


class GuideState(Protocol):
    """Where one sequence stands in its grammar."""

    def fill(self, mask: np.ndarray) -> None:
        """Writes which tokens may come next: bit i of word w of int32 [vocabulary / 32] is token 32 * w + i."""

    def advance(self, token: int) -> None:
        """Takes a token that was allowed."""


class GuideCompiler(Protocol):
    """Turns guides into the beginnings of sequences."""

    def compile(self, guide: Guide) -> Future[Callable[[], GuideState]]:
        """Returns at once; the future's result makes a new state, or it raises RequestError."""


class XGrammarCompiler:
    """Compiled grammars are kept, so that a guide that comes again costs nothing. end_ids: what may follow a complete answer."""

    def __init__(self, vocabulary: Vocabulary, vocab_size: int, end_ids: Iterable[int]):
        self._vocabulary = vocabulary
        self._vocab_size = vocab_size
        self._end_ids = sorted(end_ids)
        self._worker = ThreadPoolExecutor(1, "pagetide-grammar")
        self.compile = lru_cache(maxsize=256)(self._submit)

    def _submit(self, guide: Guide) -> Future[Callable[[], GuideState]]:
        return self._worker.submit(self._compile, guide)

    @cached_property
    def _compiler(self) -> Any:
        import xgrammar  # slow to import, and only guided requests need it

        texts = self._vocabulary.shown + [b""] * (self._vocab_size - len(self._vocabulary.shown))
        tokens = xgrammar.TokenizerInfo(texts[: self._vocab_size], xgrammar.VocabType.RAW, vocab_size=self._vocab_size, stop_token_ids=self._end_ids)
        return xgrammar.GrammarCompiler(tokens, max_threads=1, cache_limit_bytes=256 * 2**20)

    def _compile(self, guide: Guide) -> Callable[[], GuideState]:
        import xgrammar

        if not self._end_ids:
            raise RequestError("guided decoding needs a model with an end-of-sequence token, and this one has none")
        try:
            compiled = _COMPILE[guide.kind](self._compiler, guide.text)
        # xgrammar's own errors are RuntimeErrors of many kinds, and its parsers raise ValueError and TypeError too.
        except (RuntimeError, ValueError, TypeError, KeyError) as error:
            reason = re.sub(r"\s+", " ", re.sub(r"^\[.*?\] \S+: ", "", str(error)))[:300]
            raise RequestError(f"guided_decoding_guide is no valid {guide.kind}: {reason}") from None
        return lambda: XGrammarState(xgrammar.GrammarMatcher(compiled))


class XGrammarState:
    """A matcher and its place."""

    def __init__(self, matcher: Any):
        self._matcher = matcher

    def fill(self, mask: np.ndarray) -> None:
        self._matcher.fill_next_token_bitmask(mask.reshape(1, -1))

    def advance(self, token: int) -> None:
        accepted = self._matcher.accept_token(token)
        assert accepted, token


def choice_grammar(text: str) -> str:
    """EBNF for one of the texts of a JSON list."""
    return "root ::= " + " | ".join(json.dumps(option, ensure_ascii=False) for option in json.loads(text))


# Any number of blanks between JSON's parts lets small models write nothing else.
_COMPILE: dict[str, Callable[[Any, str], Any]] = {
    "json": lambda compiler, text: compiler.compile_json_schema('{"type": "object"}', any_whitespace=False, strict_mode=False),
    "json_schema": lambda compiler, text: compiler.compile_json_schema(text, any_whitespace=False),
    "regex": lambda compiler, text: compiler.compile_regex(text),
    "ebnf_grammar": lambda compiler, text: compiler.compile_grammar(text),
    "choice": lambda compiler, text: compiler.compile_grammar(choice_grammar(text)),
    "structural_tag": lambda compiler, text: compiler.compile_structural_tag(json.loads(text)),
}
