"""From the engine's outputs to Triton responses: one client request, its prompts, and what it has been sent
so far.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import msgspec
import triton_python_backend_utils as pb_utils

from pagetide.contract.outputs import VLLM
from pagetide.serving import triton
from pagetide.serving.passage import Passage
from pagetide.serving.tensors import Chunk, Prompt, ResponseTensors, TokenTexts
from pagetide.types import EngineInfo, Output, Request

log = logging.getLogger("pagetide.responses")

# So often `postprocessing` is told the number of a request, and looks whether its client is gone: that takes
# as long as making the text.
_ASK_AGAIN_S = 0.05


class ClientRequest:
    """A client's request that is not answered completely.

    Usually take() sends a response for each output. A request that collects gets one response for all its
    answers, in the order of prompts and answers; if it streams all the same (vllm_model), each response has
    a row for every answer.
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
        passage: Passage | None,
    ):
        self.prompts = prompts
        self.requests: list[Request] = []  # what the engine has been asked
        self._sender = sender
        self._is_decoupled = is_decoupled
        self._collects = collects
        # What goes through `postprocessing`: who calls this model itself, and names no outputs, wants all.
        wants_all = {"finish_reason", f"{VLLM}finish_reason"} <= set(wanted)
        self._passage = passage if "chunk_number" in wanted and not wants_all else None
        self._make_tensors = ResponseTensors(frozenset(wanted), engine, texts)
        self._is_closed = False  # the last response has been sent
        self._has_sent = False  # or any
        self._was_repeated = False
        self._lock = threading.Lock()  # outputs and failures come from different threads
        self._begin()

    def _begin(self) -> None:
        """Nothing is known of its answers."""
        self._prompt_of = {prompt.number: prompt for prompt in self.prompts}
        self._num_open = sum(prompt.num_answers for prompt in self.prompts)
        self._num_responses: Counter[tuple[int, int]] = Counter()
        self._collected: list[Chunk] = []
        self._last: dict[tuple[int, int], Output] = {}  # of each prompt's answers
        # When `postprocessing` is to look for the client of each prompt again.
        self._ask_at: dict[int, float] = {}

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
            if output.number not in self._prompt_of:
                return False  # of the engine before, whose answer has begun again
            self._num_open -= bool(output.finish_reason)
            key = (output.number, output.index)
            prompt = self._prompt_of[output.number]
            if self._collects:
                self._last[key] = output
            self._collected.append(Chunk(prompt, output, self._num_responses[key]))
            self._num_responses[key] += 1
            streams = self._is_decoupled and (prompt.parsed.stream or not self._collects)
            if streams and self._collects:
                self._collected += self._silent_rows(prompt, output.index)
            if streams or not self._num_open:
                self._send_collected()
            return not self._num_open

    def is_late(self, now_ns: int) -> bool:
        """Whether the time of any of its prompts is up."""
        return any(0 < request.deadline_ns < now_ns for request in self.requests)

    def end(self, reason: str) -> None:
        """Every answer ends, with nothing in it."""
        for prompt in self.prompts:
            for index in range(prompt.num_answers):
                self.take(Output(prompt.number, index, [], finish_reason=reason))

    def begin_again(self, numbers: Iterator[int]) -> bool:
        """Its prompts get new numbers, as if nothing had come of it. False if its client knows better, or it
        has begun again before: whatever ends an engine twice must not do so for ever.
        """
        with self._lock:
            if self._is_closed or self._has_sent or self._was_repeated:
                return False
            self._was_repeated = True
            new = {prompt.number: next(numbers) for prompt in self.prompts}
            self.prompts = [replace(prompt, number=new[prompt.number]) for prompt in self.prompts]
            self.requests = [
                msgspec.structs.replace(request, number=new[request.number]) for request in self.requests
            ]
            self._begin()
            return True

    def _silent_rows(self, prompt: Prompt, speaking: int) -> list[Chunk]:
        """Rows of the answers that have nothing new to say."""
        others = [index for index in range(prompt.num_answers) if index != speaking]
        said = [self._last.get((prompt.number, i), Output(prompt.number, i, [])) for i in others]
        return [Chunk(prompt, silent(output), 0) for output in said]

    def fail(self, error: Exception) -> None:
        """Sends the error as the last response."""
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                send(self._sender, triton.error_response(error), is_last=True)

    def _send_collected(self) -> None:
        rows = sorted(self._collected, key=lambda chunk: (chunk.prompt.batch_index, chunk.output.index))
        self._collected = []
        tensors = self._make_tensors(rows, self._notes(rows[0].prompt.number))
        response = pb_utils.InferenceResponse(tensors)
        self._has_sent = True
        self._is_closed = not self._num_open
        send(self._sender, response, is_last=self._is_closed)

    def _notes(self, number: int) -> dict[str, int]:
        """What `postprocessing` is told: whose client to look for, and which chunk this is."""
        notes, now = {}, time.monotonic()
        if self._num_open and now >= self._ask_at.get(number, 0.0):
            self._ask_at[number] = now + _ASK_AGAIN_S
            notes["request_number"] = number
        if self._passage is not None and (mark := self._passage.next_mark()):
            notes["chunk_number"] = mark
        return notes


def silent(last: Output) -> Output:
    """What is still true of an answer that has nothing new to say."""
    return Output(
        last.number,
        last.index,
        [],
        finish_reason=last.finish_reason,
        num_cached_tokens=last.num_cached_tokens,
        cumulative_logprob=last.cumulative_logprob,
        timings=last.timings,
    )


def send(sender: Any, response: Any, is_last: bool) -> None:
    """Sends one response. A client that is gone is no error: the cancel poll ends its sequences."""
    try:
        sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if is_last else 0)
    except pb_utils.TritonModelException as error:
        log.warning("a response could not be sent: %s", error)
