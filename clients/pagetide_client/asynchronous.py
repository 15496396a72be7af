"""The client for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

import tritonclient.grpc.aio as grpc
from tritonclient.utils import InferenceServerException

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


class AsyncClient:
    """Connects to one Triton; its calls may run side by side. Arguments as Client's."""

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
        self._client = grpc.InferenceServerClient(url)

    async def generate(self, prompt: Prompt, timeout: float | None = None, **fields: Any) -> Completion:
        """Goes on with a prompt: its whole answers. Raises PagetideError."""
        return await self._whole(completion_inputs(prompt, False, fields), fields, timeout)

    def stream(
        self, prompt: Prompt, timeout: float | None = None, **fields: Any
    ) -> AsyncGenerator[Chunk, None]:
        """Goes on with a prompt: chunks as they come. Raises PagetideError."""
        return self._run(completion_inputs(prompt, True, fields), fields, timeout)

    async def chat(self, messages: Messages, timeout: float | None = None, **fields: Any) -> Completion:
        """Answers a conversation ({"role", "content"} each): the whole answers. Raises PagetideError."""
        return await self._whole(chat_inputs(messages, False, fields), fields, timeout)

    def stream_chat(
        self, messages: Messages, timeout: float | None = None, **fields: Any
    ) -> AsyncGenerator[Chunk, None]:
        """Answers a conversation: chunks as they come. Raises PagetideError."""
        return self._run(chat_inputs(messages, True, fields), fields, timeout)

    async def is_ready(self) -> bool:
        """Whether the model can be asked."""
        try:
            return bool(await self._client.is_model_ready(self._model))
        except InferenceServerException:
            return False

    async def close(self) -> None:
        """Ends the connection; streams that still run are lost."""
        await self._client.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def _whole(self, inputs: list[Any], fields: dict[str, Any], timeout: float | None) -> Completion:
        async with aclosing(self._run(inputs, fields, timeout)) as chunks:
            return joined([chunk async for chunk in chunks])

    async def _run(
        self, inputs: list[Any], fields: dict[str, Any], timeout: float | None
    ) -> AsyncGenerator[Chunk, None]:
        limit = self._timeout if timeout is None else timeout
        deadline = None if limit is None else asyncio.get_running_loop().time() + limit
        outputs, attempt = outputs_for(fields), 0
        while True:
            attempt += 1
            has_begun = False
            try:
                async with aclosing(self._attempt(inputs, outputs, deadline)) as chunks:
                    async for chunk in chunks:
                        has_begun = True
                        yield chunk
                return
            except (ServerBusyError, ServerUnavailableError):
                wait = self._retries.wait(attempt)
                left = wait if deadline is None else deadline - asyncio.get_running_loop().time()
                if has_begun or attempt > self._retries.count or left < wait:
                    raise
                await asyncio.sleep(wait)

    async def _attempt(
        self, inputs: list[Any], outputs: list[Any], deadline: float | None
    ) -> AsyncGenerator[Chunk, None]:
        """Sends the request once, on a stream of its own; leaving cancels it."""

        async def requests() -> AsyncIterator[dict[str, Any]]:
            yield {
                "model_name": self._model,
                "inputs": inputs,
                "outputs": outputs,
                "enable_empty_final_response": False,
            }

        responses = self._client.stream_infer(requests())
        try:
            while True:
                left = None if deadline is None else max(0.0, deadline - asyncio.get_running_loop().time())
                try:
                    result, error = await asyncio.wait_for(anext(responses), left)
                except asyncio.TimeoutError:
                    raise RequestTimeoutError(
                        "the answer was not whole in time and has been cancelled"
                    ) from None
                except InferenceServerException as failure:
                    raise error_of(failure) from failure
                if error is not None:
                    raise error_of(error)
                yield chunk_of(result)
                if is_last(result):
                    return
        finally:
            responses.cancel()
