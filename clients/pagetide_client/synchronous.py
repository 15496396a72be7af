"""The client for programs with threads, or none."""

from __future__ import annotations

import time
from collections.abc import Generator
from typing import Any

import grpc
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from pagetide_client.answers import Chunk, Completion, chunk_of, is_last, joined
from pagetide_client.errors import ServerBusyError, ServerUnavailableError, ended_early, error_of_call
from pagetide_client.requests import (
    CHANNEL,
    Messages,
    Prompt,
    Retries,
    chat_request,
    completion_request,
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
        self._model = model
        self._timeout = timeout
        self._retries = retries or Retries()
        self._channel = grpc.insecure_channel(url, CHANNEL)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def generate(self, prompt: Prompt, timeout: float | None = None, **fields: Any) -> Completion:
        """Goes on with a prompt: its whole answers. Raises PagetideError."""
        limit = self._timeout if timeout is None else timeout
        return joined(self._run(completion_request(self._model, prompt, False, fields, limit), limit))

    def stream(
        self, prompt: Prompt, timeout: float | None = None, **fields: Any
    ) -> Generator[Chunk, None, None]:
        """Goes on with a prompt: chunks as they come. Raises PagetideError."""
        limit = self._timeout if timeout is None else timeout
        return self._run(completion_request(self._model, prompt, True, fields, limit), limit)

    def chat(self, messages: Messages, timeout: float | None = None, **fields: Any) -> Completion:
        """Answers a conversation ({"role", "content"} each): the whole answers. Raises PagetideError."""
        limit = self._timeout if timeout is None else timeout
        return joined(self._run(chat_request(self._model, messages, False, fields, limit), limit))

    def stream_chat(
        self, messages: Messages, timeout: float | None = None, **fields: Any
    ) -> Generator[Chunk, None, None]:
        """Answers a conversation: chunks as they come. Raises PagetideError."""
        limit = self._timeout if timeout is None else timeout
        return self._run(chat_request(self._model, messages, True, fields, limit), limit)

    def is_ready(self) -> bool:
        """Whether the model can be asked."""
        try:
            return bool(self._stub.ModelReady(pb.ModelReadyRequest(name=self._model), timeout=10).ready)
        except grpc.RpcError:
            return False

    def close(self) -> None:
        """Ends the connection and cancels what still runs."""
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _run(self, request: pb.ModelInferRequest, limit: float | None) -> Generator[Chunk, None, None]:
        deadline = None if limit is None else time.monotonic() + limit
        attempt = 0
        while True:
            attempt += 1
            has_begun = False
            try:
                for chunk in self._attempt(request, deadline):
                    has_begun = True
                    yield chunk
                return
            except (ServerBusyError, ServerUnavailableError):
                left = None if deadline is None else deadline - time.monotonic()
                pause = self._retries.pause(attempt, left)
                if has_begun or pause is None:
                    raise
                time.sleep(pause)

    def _attempt(self, request: pb.ModelInferRequest, deadline: float | None) -> Generator[Chunk, None, None]:
        """Sends the request once, on a stream of its own; leaving cancels it."""
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        try:
            call = self._stub.ModelStreamInfer(iter([request]), timeout=left)
        except ValueError as error:  # gRPC's word for a closed channel
            raise ServerUnavailableError("this client has been closed") from error
        try:
            for response in call:
                yield chunk_of(response)
                if is_last(response):
                    return
            raise ended_early()
        except grpc.RpcError as failure:
            raise error_of_call(failure) from failure
        finally:
            call.cancel()
