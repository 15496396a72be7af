"""The client for programs with threads, or none."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator
from typing import Any

import tritonclient.grpc as grpc

from pagetide_client.answers import Chunk, Completion, chunk_of, is_last, joined
from pagetide_client.errors import RequestTimeoutError, ServerBusyError, ServerUnavailableError, error_of
from pagetide_client.requests import (
    Messages,
    Prompt,
    Retries,
    chat_inputs,
    completion_inputs,
    outputs_for,
)


class Client:
    """Connects to one Triton; may be used by many threads at once.

    timeout: seconds within which an answer must be whole (None: no limit), unless a call has its own.
    """

    def __init__(
        self,
        url: str = "127.0.0.1:8001",
        model: str = "ensemble",
        timeout: float | None = None,
        retries: Retries | None = None,
    ):
        self._url = url
        self._model = model
        self._timeout = timeout
        self._retries = retries or Retries()
        self._control = grpc.InferenceServerClient(url)  # keeps the channel that all requests share

    def generate(self, prompt: Prompt, timeout: float | None = None, **fields: Any) -> Completion:
        """Goes on with a prompt: its whole answers. Raises PagetideError."""
        return joined(self._run(completion_inputs(prompt, False, fields), fields, timeout))

    def stream(self, prompt: Prompt, timeout: float | None = None, **fields: Any) -> Iterator[Chunk]:
        """Goes on with a prompt: chunks as they come. Raises PagetideError."""
        return self._run(completion_inputs(prompt, True, fields), fields, timeout)

    def chat(self, messages: Messages, timeout: float | None = None, **fields: Any) -> Completion:
        """Answers a conversation ({"role", "content"} each): the whole answers. Raises PagetideError."""
        return joined(self._run(chat_inputs(messages, False, fields), fields, timeout))

    def stream_chat(self, messages: Messages, timeout: float | None = None, **fields: Any) -> Iterator[Chunk]:
        """Answers a conversation: chunks as they come. Raises PagetideError."""
        return self._run(chat_inputs(messages, True, fields), fields, timeout)

    def is_ready(self) -> bool:
        """Whether the model can be asked."""
        try:
            return bool(self._control.is_model_ready(self._model))
        except grpc.InferenceServerException:
            return False

    def close(self) -> None:
        """Ends the connection; streams that still run are lost."""
        self._control.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _run(self, inputs: list[Any], fields: dict[str, Any], timeout: float | None) -> Iterator[Chunk]:
        limit = self._timeout if timeout is None else timeout
        deadline = None if limit is None else time.monotonic() + limit
        outputs, attempt = outputs_for(fields), 0
        while True:
            attempt += 1
            has_begun = False
            try:
                for chunk in self._attempt(inputs, outputs, deadline):
                    has_begun = True
                    yield chunk
                return
            except (ServerBusyError, ServerUnavailableError):
                wait = self._retries.wait(attempt)
                if has_begun or attempt > self._retries.count or _left(deadline, wait) < wait:
                    raise
                time.sleep(wait)

    def _attempt(self, inputs: list[Any], outputs: list[Any], deadline: float | None) -> Iterator[Chunk]:
        """Sends the request once, on a stream of its own; leaving cancels it."""
        responses: queue.Queue[Any] = queue.Queue()
        stream = grpc.InferenceServerClient(self._url)
        stream.start_stream(lambda result, error: responses.put(error or result))
        try:
            stream.async_stream_infer(self._model, inputs, outputs=outputs)
            while True:
                try:
                    response = responses.get(timeout=None if deadline is None else _left(deadline, 0))
                except queue.Empty:
                    raise RequestTimeoutError(
                        "the answer was not whole in time and has been cancelled"
                    ) from None
                if isinstance(response, Exception):
                    raise error_of(response)
                yield chunk_of(response)
                if is_last(response):
                    return
        finally:
            stream.stop_stream(cancel_requests=True)


def _left(deadline: float | None, otherwise: float) -> float:
    """Seconds until then, at least 0."""
    return otherwise if deadline is None else max(0.0, deadline - time.monotonic())
