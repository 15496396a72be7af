"""From the engine's outputs to Triton responses: one client request, its prompts, and what it has been sent so far."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from pagetide.serving import triton
from pagetide.serving.contract import ParsedRequest
from pagetide.serving.shared_memory import check_room
from pagetide.text.tokens import Vocabulary
from pagetide.types import EngineInfo, Output, TokenScore

log = logging.getLogger("pagetide.responses")

# So often `postprocessing` is told the number of a request, and looks whether its client is gone: that takes as long as making the text.
_ASK_AGAIN_S = 0.05
VLLM = "vllm_"  # how the outputs begin that only the face vllm_model maps


def is_vllm_face(wanted: Container[str]) -> bool:
    """True for requests through the face vllm_model: inside an ensemble the wanted outputs are those that it maps."""
    return f"{VLLM}finish_reason" in wanted and "finish_reason" not in wanted


@dataclass(frozen=True)
class Prompt:
    """One prompt of a client request. number: its engine request. is_direct: came as token ids to `llm` itself, without text."""

    number: int
    batch_index: int
    parsed: ParsedRequest
    ids: list[int]
    is_direct: bool

    @property
    def num_answers(self) -> int:
        return 1 if self.parsed.cancel else self.parsed.params.n


@dataclass(frozen=True)
class Chunk:
    """One row of a response."""

    prompt: Prompt
    output: Output
    response_index: int

    @property
    def ids(self) -> list[int]:
        # Without text there is nothing else that a prompt in front of the answer could mean.
        shows_prompt = self.prompt.is_direct and self.prompt.parsed.includes_input and not self.prompt.parsed.cancel
        return self.prompt.ids + self.output.ids if shows_prompt else self.output.ids


class TokenTexts:
    """The texts of single tokens, as log-probabilities show them; read when they are first needed."""

    def __init__(self, model: Path):
        self._model = model

    @cached_property
    def _table(self) -> list[bytes]:
        return Vocabulary.read(self._model).full

    def __getitem__(self, token: int) -> str:
        return self._table[token].decode("utf-8", "replace") if token < len(self._table) else ""


class ClientRequest:
    """A client's request that is not answered completely.

    Usually take() sends a response for each output. A request that collects gets one response for all its answers, in the order of prompts
    and answers; if it streams all the same (vllm_model), each response has a row for every answer.
    """

    def __init__(
        self,
        sender: Any,
        wanted: Iterable[str],
        prompts: list[Prompt],
        is_decoupled: bool,
        collects: bool,
        engine: EngineInfo,
        texts: TokenTexts,
    ):
        self.prompts = prompts
        self._sender = sender
        self._wanted = frozenset(wanted)
        self._is_decoupled = is_decoupled
        self._collects = collects
        self._engine = engine
        self._texts = texts
        self._prompt_of = {prompt.number: prompt for prompt in prompts}
        self._num_open = sum(prompt.num_answers for prompt in prompts)
        self._num_responses: Counter[tuple[int, int]] = Counter()
        self._collected: list[Chunk] = []
        self._reasons: dict[tuple[int, int], str] = {}
        self._ask_at: dict[int, float] = {}  # when `postprocessing` is to look for the client of each prompt again
        self._is_closed = False  # the last response has been sent
        self._lock = threading.Lock()  # outputs and failures come from different threads

    @property
    def numbers(self) -> list[int]:
        """The engine's numbers of its prompts."""
        return list(self._prompt_of)

    @property
    def is_direct(self) -> bool:
        """True if the client called this model itself, not an ensemble."""
        return any(prompt.is_direct for prompt in self.prompts)

    def is_cancelled(self) -> bool:
        """True if the client is gone."""
        # Triton crashes if it is asked about a request whose last response has been sent.
        with self._lock:
            return not self._is_closed and self._sender.is_cancelled()

    def take(self, output: Output) -> bool:
        """Sends, or keeps until all is there; True when the request has been answered completely."""
        with self._lock:
            if self._is_closed:
                return True  # has failed meanwhile
            self._num_open -= bool(output.finish_reason)
            key = (output.number, output.index)
            prompt = self._prompt_of[output.number]
            self._reasons[key] = output.finish_reason
            self._collected.append(Chunk(prompt, output, self._num_responses[key]))
            self._num_responses[key] += 1
            streams = self._is_decoupled and (prompt.parsed.stream or not self._collects)
            if streams and self._collects:
                self._collected += self._silent_rows(prompt, output.index)
            if streams or not self._num_open:
                self._send_collected()
            return not self._num_open

    def _silent_rows(self, prompt: Prompt, speaking: int) -> list[Chunk]:
        """Rows of the answers that have nothing new to say."""
        others = [index for index in range(prompt.num_answers) if index != speaking]
        return [Chunk(prompt, Output(prompt.number, index, [], finish_reason=self._reasons.get((prompt.number, index), "")), 0) for index in others]

    def fail(self, error: Exception) -> None:
        """Sends the error as the last response."""
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                send(self._sender, triton.error_response(error), is_last=True)

    def _send_collected(self) -> None:
        rows = sorted(self._collected, key=lambda chunk: (chunk.prompt.batch_index, chunk.output.index))
        self._collected = []
        tensors = tensors_of(rows, self._wanted, self._engine, self._texts, self._asks_for_client(rows[0].prompt.number))
        response = pb_utils.InferenceResponse(tensors)
        self._is_closed = not self._num_open
        send(self._sender, response, is_last=self._is_closed)

    def _asks_for_client(self, number: int) -> bool:
        now = time.monotonic()
        if not self._num_open or now < self._ask_at.get(number, 0.0):
            return False
        self._ask_at[number] = now + _ASK_AGAIN_S
        return True


def send(sender: Any, response: Any, is_last: bool) -> None:
    """Sends one response. A client that is gone is no error: the cancel poll ends its sequences."""
    try:
        sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if is_last else 0)
    except pb_utils.TritonModelException as error:
        log.warning("a response could not be sent: %s", error)


# -- tensors -----------------------------------------------------------------------------------------------------------


def tensors_of(rows: list[Chunk], wanted: frozenset[str], engine: EngineInfo, texts: TokenTexts, asks_for_client: bool) -> list[Any]:
    """The output tensors of some chunks, one row each; only wanted ones, since Triton's stub mishandles others."""
    first = rows[0].prompt.parsed
    ids = [chunk.ids for chunk in rows]
    arrays = {
        "output_ids": _padded(ids, engine.pad_id if first.pad_id is None else first.pad_id, np.int32),
        "sequence_length": _column(map(len, ids)),
        "finish_reason": triton.text_array([chunk.output.finish_reason.encode() for chunk in rows]),
        "batch_index": _column(chunk.prompt.batch_index for chunk in rows),
        "sequence_index": _column(chunk.output.index for chunk in rows),
        "response_index": _column(chunk.response_index for chunk in rows),
    }
    if asks_for_client:
        arrays["request_number"] = _column((chunk.output.number for chunk in rows), np.uint64)
    if any(chunk.output.num_cut for chunk in rows):
        arrays["text_cut"] = _column(chunk.output.num_cut for chunk in rows)
    if any(chunk.prompt.parsed.prompt_text for chunk in rows):
        arrays["prompt_text"] = triton.text_array([(chunk.prompt.parsed.prompt_text or "").encode() for chunk in rows]).reshape(-1, 1)
    if not all(chunk.prompt.parsed.params.skip_special_tokens for chunk in rows):
        arrays["skip_special_tokens"] = np.array([[chunk.prompt.parsed.params.skip_special_tokens] for chunk in rows])
    returns = {name for chunk in rows for name in chunk.prompt.parsed.returns}
    for name in returns & _RETURNS.keys():
        arrays |= _RETURNS[name](rows)
    if {"context_logits", "generation_logits"} & returns:
        arrays |= _logits(rows, returns, engine.vocab_size)
    if any(chunk.prompt.parsed.shows_logprobs for chunk in rows):
        arrays["logprobs"] = triton.text_array([json.dumps(_logprobs(chunk, texts)).encode() for chunk in rows])
    if is_vllm_face(wanted):
        arrays |= _vllm(rows, returns, texts)
    chosen = {name: array for name, array in arrays.items() if name in wanted}
    check_room(chosen.values())
    return [triton.tensor(name, array) for name, array in chosen.items()]


def _column(values: Iterable[Any], dtype: Any = np.int32) -> np.ndarray:
    return np.fromiter(values, dtype).reshape(-1, 1)


def _padded(rows: list[list[Any]], fill: float, dtype: Any) -> np.ndarray:
    """[rows, 1, longest]"""
    array = np.full((len(rows), 1, max(map(len, rows))), fill, dtype)
    for line, values in zip(array, rows, strict=True):
        line[0, : len(values)] = values
    return array


def _log_probs(rows: list[Chunk]) -> dict[str, np.ndarray]:
    return {
        "cum_log_probs": _column((chunk.output.cumulative_logprob for chunk in rows), np.float32),
        "output_log_probs": _padded([[score.logprob for score in chunk.output.scores] for chunk in rows], 0, np.float32),
    }


def _perf_metrics(rows: list[Chunk]) -> dict[str, np.ndarray]:
    times = [chunk.output.timings for chunk in rows]
    return {
        "kv_cache_reused_blocks": _column(t.reused_blocks for t in times),
        "kv_cache_alloc_new_blocks": _column(t.new_blocks for t in times),
        "kv_cache_alloc_total_blocks": _column(t.reused_blocks + t.new_blocks for t in times),
        "arrival_time_ns": _column((t.arrival_ns for t in times), np.int64),
        "first_scheduled_time_ns": _column((t.first_scheduled_ns for t in times), np.int64),
        "first_token_time_ns": _column((t.first_token_ns for t in times), np.int64),
        "last_token_time_ns": _column((t.last_token_ns for t in times), np.int64),
        "acceptance_rate": _column((0.0 for _ in times), np.float32),
        "total_accepted_draft_tokens": _column(0 for _ in times),
        "total_draft_tokens": _column(0 for _ in times),
    }


# What is there if and only if its flag says so.
_RETURNS: dict[str, Callable[[list[Chunk]], dict[str, np.ndarray]]] = {
    "num_input_tokens": lambda rows: {"num_input_tokens": _column(len(chunk.prompt.ids) for chunk in rows)},
    "num_output_tokens": lambda rows: {"num_output_tokens": _column(len(chunk.output.ids) for chunk in rows)},
    "num_cached_tokens": lambda rows: {"num_cached_tokens": _column(chunk.output.num_cached_tokens for chunk in rows)},
    "log_probs": _log_probs,
    "perf_metrics": _perf_metrics,
}


def _logits(rows: list[Chunk], returns: set[str], vocab_size: int) -> dict[str, np.ndarray]:
    """context_logits [rows, prompt tokens, vocabulary], generation_logits [rows, 1, tokens, vocabulary]; shorter rows end in zeros."""

    def gather(parts: list[bytes]) -> np.ndarray:
        arrays = [np.frombuffer(part, np.float32).reshape(-1, vocab_size) for part in parts]
        found = np.zeros((len(arrays), max(map(len, arrays)), vocab_size), np.float32)
        for row, array in zip(found, arrays, strict=True):
            row[: len(array)] = array
        return found

    found = {}
    if "context_logits" in returns and any(chunk.output.context_logits for chunk in rows):
        found["context_logits"] = gather([chunk.output.context_logits for chunk in rows])
    if "generation_logits" in returns:
        found["generation_logits"] = gather([chunk.output.generation_logits for chunk in rows])[:, None]
    return found


# -- log-probabilities as JSON -------------------------------------------------------------------------------------------


def _logprobs(chunk: Chunk, texts: TokenTexts) -> dict[str, Any]:
    """`logprobs`: one entry for each new token; `prompt_logprobs`: one for each token of the prompt, of which the first has none."""
    params, found = chunk.prompt.parsed.params, {}
    if params.logprobs is not None:
        found["logprobs"] = _entries(chunk.output.ids, chunk.output.scores, texts)
    if params.prompt_logprobs is not None and chunk.output.prompt_scores:
        found["prompt_logprobs"] = [None, *_entries(chunk.prompt.ids[1:], chunk.output.prompt_scores, texts)]
    return found


def _entries(ids: list[int], scores: list[TokenScore], texts: TokenTexts) -> list[Any]:
    return [_entry(token, score, texts) for token, score in zip(ids, scores, strict=False)]


def _entry(token: int, score: TokenScore, texts: TokenTexts) -> dict[str, Any]:
    """vLLM's form: {token id: {logprob, rank, decoded_token}}, the token's own entry first."""
    ranked = [(token, score.logprob, score.rank)]
    ranked += [(i, p, rank) for rank, (i, p) in enumerate(zip(score.top_ids, score.top_logprobs, strict=True), 1) if i != token]
    return {str(i): {"logprob": finite(p), "rank": rank, "decoded_token": texts[i]} for i, p, rank in ranked}


def finite(logprob: float) -> float:
    """JSON has no infinity: what cannot be said is very unlikely."""
    return max(logprob, -9999.0)


def _vllm_logprobs(chunk: Chunk, texts: TokenTexts) -> list[Any] | None:
    return _logprobs(chunk, texts).get("logprobs") if chunk.prompt.parsed.shows_logprobs else None


def _vllm(rows: list[Chunk], returns: set[str], texts: TokenTexts) -> dict[str, np.ndarray]:
    """Triton's vLLM backend's outputs: one-dimensional, counts as UINT32, `None` for what is not there yet."""
    arrays: dict[str, np.ndarray] = {}
    if "finish_reason" in returns:
        arrays["finish_reason"] = triton.text_array([(chunk.output.finish_reason or "None").encode() for chunk in rows])
    if "log_probs" in returns:
        arrays["cumulative_logprob"] = np.array([chunk.output.cumulative_logprob for chunk in rows], np.float32)
    if "logprobs" in returns:
        arrays["logprobs"] = triton.text_array([json.dumps(_vllm_logprobs(chunk, texts)).encode() for chunk in rows])
    if "num_input_tokens" in returns:
        arrays["num_input_tokens"] = np.array([len(rows[0].prompt.ids)], np.uint32)
    if "num_output_tokens" in returns:
        arrays["num_output_tokens"] = np.array([len(chunk.output.ids) for chunk in rows], np.uint32)
    return {VLLM + name: array for name, array in arrays.items()}
