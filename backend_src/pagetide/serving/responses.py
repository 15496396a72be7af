"""From the engine's outputs to Triton responses: one client request, its prompts, and what it has been sent
so far.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

import triton_python_backend_utils as pb_utils

from pagetide.serving import triton
from pagetide.serving.tensors import Chunk, Prompt, ResponseTensors, TokenTexts
from pagetide.types import EngineInfo, Output

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
    ):
        self.prompts = prompts
        self._sender = sender
        self._is_decoupled = is_decoupled
        self._collects = collects
        self._make_tensors = ResponseTensors(frozenset(wanted), engine, texts)
        self._prompt_of = {prompt.number: prompt for prompt in prompts}
        self._num_open = sum(prompt.num_answers for prompt in prompts)
        self._num_responses: Counter[tuple[int, int]] = Counter()
        self._collected: list[Chunk] = []
        self._last: dict[tuple[int, int], Output] = {}  # of each prompt's answers
        self._ask_at: dict[
            int, float
        ] = {}  # when `postprocessing` is to look for the client of each prompt again
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
        tensors = self._make_tensors(rows, self._asks_for_client(rows[0].prompt.number))
        response = pb_utils.InferenceResponse(tensors)
        self._is_closed = not self._num_open
        send(self._sender, response, is_last=self._is_closed)

    def _asks_for_client(self, number: int) -> bool:
        now = time.monotonic()
        if not self._num_open or now < self._ask_at.get(number, 0.0):
            return False
        self._ask_at[number] = now + _ASK_AGAIN_S
        return True


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
