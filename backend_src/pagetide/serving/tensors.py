"""The output tensors of responses: one row for each chunk of an answer, by the table of
contract/outputs.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pagetide.contract.outputs import ALL_OUTPUTS, VLLM, VLLM_OUTPUTS
from pagetide.contract.parsed import ParsedRequest
from pagetide.serving import triton
from pagetide.serving.shared_memory import check_room
from pagetide.text.tokens import Vocabulary
from pagetide.types import EngineInfo, Output, TokenScore

# Outputs that only `postprocessing` reads, on its way.
NOTES = {"request_number", "chunk_number"}
_VERY_UNLIKELY = -9999.0  # JSON has no infinity


def is_vllm_face(wanted: Container[str]) -> bool:
    """True for requests through vllm_model: inside an ensemble the wanted outputs are those that it maps."""
    return f"{VLLM}finish_reason" in wanted and "finish_reason" not in wanted


@dataclass(frozen=True)
class Prompt:
    """One prompt of a client request.

    number: its engine request. is_direct: came as token ids to `llm` itself, without text.
    """

    number: int
    batch_index: int
    parsed: ParsedRequest
    ids: list[int]
    is_direct: bool

    @property
    def num_answers(self) -> int:
        """How many sequences the client waits for; a cancel has one empty answer."""
        return 1 if self.parsed.cancel else self.parsed.params.n

    @cached_property
    def asked(self) -> frozenset[str]:
        """The request fields that ask for outputs."""
        return frozenset((*self.parsed.returns, *(["logprobs"] if self.parsed.shows_logprobs else [])))


@dataclass(frozen=True)
class Chunk:
    """One row of a response."""

    prompt: Prompt
    output: Output
    response_index: int

    @property
    def ids(self) -> list[int]:
        """What `output_ids` shows of it, the prompt in front where the client asked for that."""
        # Without text there is nothing else that a prompt in front of the answer could mean.
        shows_prompt = self.prompt.is_direct and self.prompt.parsed.includes_input
        is_cancel = self.prompt.parsed.cancel
        return self.prompt.ids + self.output.ids if shows_prompt and not is_cancel else self.output.ids


class TokenTexts:
    """The texts of single tokens, as log-probabilities show them; read when they are first needed."""

    def __init__(self, model: Path):
        self._model = model

    @cached_property
    def _table(self) -> list[bytes]:
        return Vocabulary.read(self._model).full

    def shown(self, token: int) -> dict[str, Any]:
        """`decoded_token`, and `bytes` where that cannot tell them: tokens may be parts of a character."""
        raw = self._table[token] if token < len(self._table) else b""
        text = raw.decode("utf-8", "replace")
        return (
            {"decoded_token": text} if text.encode() == raw else {"decoded_token": text, "bytes": list(raw)}
        )


class ResponseTensors:
    """Makes the tensors of the responses to one client request.

    wanted: the only outputs that may be sent, since Triton's stub mishandles others.
    """

    def __init__(self, wanted: frozenset[str], engine: EngineInfo, texts: TokenTexts):
        self._wanted = wanted
        self._engine = engine
        self._texts = texts
        self._is_vllm = is_vllm_face(wanted)
        self._makers: dict[frozenset[str], list[tuple[str, Maker]]] = {}

    def __call__(self, rows: list[Chunk], notes: dict[str, int]) -> list[Any]:
        """notes: for `postprocessing`, by the names of outputs, of which NOTES has all."""
        asked = rows[0].prompt.asked.union(*(chunk.prompt.asked for chunk in rows[1:]))
        found = {name: make(rows, self) for name, make in self._makers_for(asked)}
        for name in notes.keys() & self._wanted:
            found[name] = np.full((len(rows), 1), notes[name], np.uint64)
        arrays = {name: array for name, array in found.items() if array is not None}
        check_room(arrays.values())
        return [triton.tensor(name, array) for name, array in arrays.items()]

    def _makers_for(self, asked: frozenset[str]) -> list[tuple[str, Maker]]:
        if asked not in self._makers:
            chosen = [
                (name, _MAKERS[name])
                for name, output in ALL_OUTPUTS.items()
                if name in self._wanted
                and name not in NOTES
                and (not output.asked_by or output.asked_by in asked)
                and (output not in VLLM_OUTPUTS or self._is_vllm)
            ]
            self._makers[asked] = chosen
        return self._makers[asked]

    # -- outputs that are more than one number for each row: arrays [rows, ...], None where there is none --

    def ids(self, rows: list[Chunk]) -> np.ndarray:
        """[rows, longest chunk], shorter ones filled up with the request's `pad_id`."""
        pad_id = rows[0].prompt.parsed.pad_id
        fill = self._engine.pad_id if pad_id is None else pad_id
        return _padded([chunk.ids for chunk in rows], fill, np.int32)

    def log_probs(self, rows: list[Chunk]) -> np.ndarray:
        """[rows, longest chunk], shorter ones filled up with 0."""
        return _padded([[score.logprob for score in chunk.output.scores] for chunk in rows], 0, np.float32)

    def prompt_texts(self, rows: list[Chunk]) -> np.ndarray | None:
        """[rows, 1] of UTF-8; None where no prompt stands in front of its answer."""
        texts = [chunk.prompt.parsed.prompt_text or "" for chunk in rows]
        return triton.text_array([text.encode() for text in texts]).reshape(-1, 1) if any(texts) else None

    def context_logits(self, rows: list[Chunk]) -> np.ndarray | None:
        """[rows, prompt tokens, vocabulary]"""
        parts = [chunk.output.context_logits for chunk in rows]
        return self._logits(parts) if any(parts) else None

    def generation_logits(self, rows: list[Chunk]) -> np.ndarray:
        """[rows, 1, tokens, vocabulary]"""
        return self._logits([chunk.output.generation_logits for chunk in rows])[:, None]

    def _logits(self, parts: list[bytes]) -> np.ndarray:
        """Shorter rows end in zeros."""
        size = self._engine.vocab_size
        arrays = [np.frombuffer(part, np.float32).reshape(-1, size) for part in parts]
        found = np.zeros((len(arrays), max(map(len, arrays)), size), np.float32)
        for row, array in zip(found, arrays, strict=True):
            row[: len(array)] = array
        return found

    def logprobs(self, rows: list[Chunk]) -> np.ndarray:
        """[rows, 1] of JSON, as vLLM's API has it."""
        return _texts(json.dumps(self._logprobs_of(chunk)) for chunk in rows)

    def vllm_logprobs(self, rows: list[Chunk]) -> np.ndarray:
        """[rows, 1] of JSON as Triton's vLLM backend answers: null unless `return_logprobs` was set."""
        shown = [chunk.prompt.parsed.shows_logprobs for chunk in rows]
        found = [self._logprobs_of(chunk).get("logprobs") for chunk in rows]
        return _texts(
            json.dumps(one if is_shown else None) for one, is_shown in zip(found, shown, strict=True)
        )

    def _logprobs_of(self, chunk: Chunk) -> dict[str, Any]:
        """`logprobs`: an entry for each new token; `prompt_logprobs`: one for each of the prompt, none for
        its first.
        """
        params, found = chunk.prompt.parsed.params, {}
        if params.logprobs is not None:
            found["logprobs"] = self._entries(chunk.output.ids, chunk.output.scores)
        is_first = chunk.output.index == 0 and chunk.response_index == 0
        has_scores = bool(chunk.output.prompt_scores) or (is_first and len(chunk.prompt.ids) == 1)
        if params.prompt_logprobs is not None and has_scores:
            found["prompt_logprobs"] = [
                None,
                *self._entries(chunk.prompt.ids[1:], chunk.output.prompt_scores),
            ]
        return found

    def _entries(self, ids: list[int], scores: list[TokenScore]) -> list[Any]:
        return [self._entry(token, score) for token, score in zip(ids, scores, strict=False)]

    def _entry(self, token: int, score: TokenScore) -> dict[str, Any]:
        """vLLM's form: {token id: {logprob, rank, decoded_token}}, the token's own entry first."""
        ranked = [(token, score.logprob, score.rank)]
        top = zip(score.top_ids, score.top_logprobs, strict=True)
        ranked += [(i, logprob, rank) for rank, (i, logprob) in enumerate(top, 1) if i != token]
        return {
            str(i): {
                "logprob": max(logprob, _VERY_UNLIKELY),
                "rank": rank,
                **self._texts.shown(i),
            }
            for i, logprob, rank in ranked
        }


Maker = Callable[[list[Chunk], ResponseTensors], "np.ndarray | None"]


def _padded(rows: list[list[Any]], fill: float, dtype: Any) -> np.ndarray:
    """[rows, 1, longest]"""
    array = np.full((len(rows), 1, max(map(len, rows))), fill, dtype)
    for line, values in zip(array, rows, strict=True):
        line[0, : len(values)] = values
    return array


def _texts(texts: Iterable[str]) -> np.ndarray:
    return triton.text_array([text.encode() for text in texts])


def _numbers(name: str, value: Callable[[Chunk], Any]) -> Maker:
    """One number for each row: [rows, 1], or [rows] for the face vllm_model, which has no batch."""
    shape = (-1,) if name.startswith(VLLM) else (-1, 1)
    dtype = ALL_OUTPUTS[name].numpy_dtype
    return lambda rows, _: np.fromiter(map(value, rows), dtype, len(rows)).reshape(shape)


def _numbers_if_any(name: str, value: Callable[[Chunk], Any], usual: Any) -> Maker:
    """The same; nothing where all are as usual."""
    make = _numbers(name, value)
    return lambda rows, tensors: None if all(value(row) == usual for row in rows) else make(rows, tensors)


_VALUES: dict[str, Callable[[Chunk], Any]] = {
    "sequence_length": lambda chunk: len(chunk.ids),
    "batch_index": lambda chunk: chunk.prompt.batch_index,
    "sequence_index": lambda chunk: chunk.output.index,
    "response_index": lambda chunk: chunk.response_index,
    "num_input_tokens": lambda chunk: len(chunk.prompt.ids),
    "num_output_tokens": lambda chunk: len(chunk.output.ids),
    "num_cached_tokens": lambda chunk: chunk.output.num_cached_tokens,
    "cum_log_probs": lambda chunk: chunk.output.cumulative_logprob,
    "kv_cache_reused_blocks": lambda chunk: chunk.output.timings.reused_blocks,
    "kv_cache_alloc_new_blocks": lambda chunk: chunk.output.timings.new_blocks,
    "kv_cache_alloc_total_blocks": lambda chunk: (
        chunk.output.timings.reused_blocks + chunk.output.timings.new_blocks
    ),
    "arrival_time_ns": lambda chunk: chunk.output.timings.arrival_ns,
    "first_scheduled_time_ns": lambda chunk: chunk.output.timings.first_scheduled_ns,
    "first_token_time_ns": lambda chunk: chunk.output.timings.first_token_ns,
    "last_token_time_ns": lambda chunk: chunk.output.timings.last_token_ns,
    "acceptance_rate": lambda chunk: (
        chunk.output.timings.accepted_tokens / max(chunk.output.timings.drafted_tokens, 1)
    ),
    "total_accepted_draft_tokens": lambda chunk: chunk.output.timings.accepted_tokens,
    "total_draft_tokens": lambda chunk: chunk.output.timings.drafted_tokens,
    f"{VLLM}cumulative_logprob": lambda chunk: chunk.output.cumulative_logprob,
    f"{VLLM}num_output_tokens": lambda chunk: len(chunk.output.ids),
}
_MAKERS: dict[str, Maker] = {name: _numbers(name, value) for name, value in _VALUES.items()} | {
    "output_ids": lambda rows, tensors: tensors.ids(rows),
    "finish_reason": lambda rows, _: _texts(chunk.output.finish_reason for chunk in rows),
    "output_log_probs": lambda rows, tensors: tensors.log_probs(rows),
    "logprobs": lambda rows, tensors: tensors.logprobs(rows),
    "context_logits": lambda rows, tensors: tensors.context_logits(rows),
    "generation_logits": lambda rows, tensors: tensors.generation_logits(rows),
    "text_cut": _numbers_if_any("text_cut", lambda chunk: chunk.output.num_cut, 0),
    "prompt_text": lambda rows, tensors: tensors.prompt_texts(rows),
    "skip_special_tokens": _numbers_if_any(
        "skip_special_tokens", lambda chunk: chunk.prompt.parsed.params.skip_special_tokens, True
    ),
    f"{VLLM}finish_reason": lambda rows, _: _texts(chunk.output.finish_reason or "None" for chunk in rows),
    f"{VLLM}logprobs": lambda rows, tensors: tensors.vllm_logprobs(rows),
    # One number for all answers, which have one prompt.
    f"{VLLM}num_input_tokens": lambda rows, _: np.array([len(rows[0].prompt.ids)], np.uint32),
}
