"""From the engine's outputs to Triton responses: one client request, its prompts, and what it has been sent so far."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from pagetide.serving import triton
from pagetide.serving.contract import ParsedRequest
from pagetide.types import Output

log = logging.getLogger("pagetide.responses")


@dataclass(frozen=True)
class Prompt:
    """One prompt of a client request. number: its engine request. is_direct: came as token ids to `llm` itself, without text."""

    number: int
    batch_index: int
    parsed: ParsedRequest
    ids: list[int]
    is_direct: bool


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


class ClientRequest:
    """A client's request that is not answered completely.

    Decoupled: take() sends a response for each output. Otherwise it sends one response for all, in the order of prompts and samples.
    """

    def __init__(self, sender: Any, wanted: Iterable[str], prompts: list[Prompt], is_decoupled: bool, pad_id: int):
        self.prompts = prompts
        self._sender = sender
        self._wanted = frozenset(wanted)
        self._is_decoupled = is_decoupled
        self._pad_id = pad_id
        self._prompt_of = {prompt.number: prompt for prompt in prompts}
        self._num_open = sum(1 if prompt.parsed.cancel else prompt.parsed.params.n for prompt in prompts)
        self._num_responses: Counter[tuple[int, int]] = Counter()
        self._collected: list[Chunk] = []
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
            return bool(self._num_open and self._sender.is_cancelled())

    def take(self, output: Output) -> bool:
        """Sends, or keeps until all is there; True when the request has been answered completely."""
        with self._lock:
            if not self._num_open:
                return True  # has failed meanwhile
            self._num_open -= bool(output.finish_reason)
            key = (output.number, output.index)
            self._collected.append(Chunk(self._prompt_of[output.number], output, self._num_responses[key]))
            self._num_responses[key] += 1
            if self._is_decoupled or not self._num_open:
                self._send_collected()
            return not self._num_open

    def fail(self, error: Exception) -> None:
        """Sends the error as the last response."""
        with self._lock:
            if self._num_open:
                self._num_open = 0
                send(self._sender, triton.error_response(error), is_last=True)

    def _send_collected(self) -> None:
        rows = sorted(self._collected, key=lambda chunk: (chunk.prompt.batch_index, chunk.output.index))
        self._collected = []
        send(self._sender, pb_utils.InferenceResponse(tensors_of(rows, self._wanted, self._pad_id)), is_last=not self._num_open)


def send(sender: Any, response: Any, is_last: bool) -> None:
    """Sends one response. A client that is gone is no error: the cancel poll ends its sequences."""
    try:
        sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if is_last else 0)
    except pb_utils.TritonModelException as error:
        log.warning("a response could not be sent: %s", error)


def tensors_of(rows: list[Chunk], wanted: frozenset[str], pad_id: int) -> list[Any]:
    """The output tensors of some chunks, one row each; only wanted ones, since Triton's stub mishandles others."""
    ids = [chunk.ids for chunk in rows]
    padded = np.full((len(rows), 1, max(map(len, ids))), pad_id, np.int32)
    for row, its_ids in zip(padded, ids, strict=True):
        row[0, : len(its_ids)] = its_ids

    def column(values: Iterable[int], dtype: Any = np.int32) -> np.ndarray:
        return np.fromiter(values, dtype).reshape(-1, 1)

    outputs = [chunk.output for chunk in rows]
    arrays = {
        "output_ids": padded,
        "sequence_length": column(map(len, ids)),
        "finish_reason": triton.text_array([output.finish_reason.encode() for output in outputs]),
        "batch_index": column(chunk.prompt.batch_index for chunk in rows),
        "sequence_index": column(output.index for output in outputs),
        "response_index": column(chunk.response_index for chunk in rows),
        "request_number": column((output.number for output in outputs), np.uint64),
        "text_cut": column(output.num_cut for output in outputs),
    }
    parsed = [chunk.prompt.parsed for chunk in rows]
    if any(one.prompt_text for one in parsed):
        arrays["prompt_text"] = triton.text_array([(one.prompt_text or "").encode() for one in parsed]).reshape(-1, 1)
    counts = {
        "num_input_tokens": (len(chunk.prompt.ids) for chunk in rows),
        "num_output_tokens": (len(output.ids) for output in outputs),
        "num_cached_tokens": (output.num_cached_tokens for output in outputs),
    }
    arrays |= {name: column(values) for name, values in counts.items() if any(name in one.returns for one in parsed)}
    return [triton.tensor(name, array) for name, array in arrays.items() if name in wanted]
