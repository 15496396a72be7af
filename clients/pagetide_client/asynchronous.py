"""The client for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
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


class AsyncClient:
    """Connects to one Triton, within one event loop; its calls may run side by side. Arguments as Client's.

    A stream that is left by break is cancelled soon; `async with contextlib.aclosing(...)` does so at once.
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
        self._channel = grpc.aio.insecure_channel(url, CHANNEL)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    async def generate(self, prompt: Prompt, timeout: float | None = None, **fields: Any) -> Completion:
        """Goes on with a prompt: its whole answers. Raises PagetideError."""
        limit = self._timeout if timeout is None else timeout
        return await self._whole(completion_request(self._model, prompt, False, fields, limit), limit)

    def stream(
        self, prompt: Prompt, timeout: float | None = None, **fields: Any
    ) -> AsyncGenerator[Chunk, None]:
        """Goes on with a prompt: chunks as they come. Raises PagetideError."""
        limit = self._timeout if timeout is None else timeout
        return self._run(completion_request(self._model, prompt, True, fields, limit), limit)

    async def chat(self, messages: Messages, timeout: float | None = None, **fields: Any) -> Completion:
        """Answers a conversation ({"role", "content"} each): the whole answers. Raises PagetideError."""
        limit = self._timeout if timeout is None else timeout
        return await self._whole(chat_request(self._model, messages, False, fields, limit), limit)

    def stream_chat(
        self, messages: Messages, timeout: float | None = None, **fields: Any
    ) -> AsyncGenerator[Chunk, None]:
        """Answers a conversation: chunks as they come. Raises PagetideError."""
        limit = self._timeout if timeout is None else timeout
        return self._run(chat_request(self._model, messages, True, fields, limit), limit)

    async def is_ready(self) -> bool:
        """Whether the model can be asked."""
        try:
            answer = await self._stub.ModelReady(pb.ModelReadyRequest(name=self._model), timeout=10)
            return bool(answer.ready)
        except grpc.RpcError:
            return False

    async def close(self) -> None:
        """Ends the connection and cancels what still runs."""
        await self._channel.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def _whole(self, request: pb.ModelInferRequest, limit: float | None) -> Completion:
        async with aclosing(self._run(request, limit)) as chunks:
            return joined([chunk async for chunk in chunks])

    async def _run(self, request: pb.ModelInferRequest, limit: float | None) -> AsyncGenerator[Chunk, None]:
        now = asyncio.get_running_loop().time
        deadline = None if limit is None else now() + limit
        attempt = 0
        while True:
            attempt += 1
            has_begun = False
            left = None if deadline is None else max(0.0, deadline - now())
            try:
                async with aclosing(self._attempt(request, left)) as chunks:
                    async for chunk in chunks:
                        has_begun = True
                        yield chunk
                return
            except (ServerBusyError, ServerUnavailableError):
                pause = self._retries.pause(attempt, None if deadline is None else deadline - now())
                if has_begun or pause is None:
                    raise
                await asyncio.sleep(pause)

    async def _attempt(
        self, request: pb.ModelInferRequest, left: float | None
    ) -> AsyncGenerator[Chunk, None]:
        """Sends the request once, on a stream of its own; leaving cancels it."""
        try:
            call = self._stub.ModelStreamInfer(iter([request]), timeout=left)
        except grpc.aio.UsageError as error:
            raise ServerUnavailableError("this client has been closed") from error
        try:
            async for response in call:
                yield chunk_of(response)
                if is_last(response):
                    return
            raise ended_early()
        except grpc.RpcError as failure:
            raise error_of_call(failure) from failure
        finally:
            call.cancel()
