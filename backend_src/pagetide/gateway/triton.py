"""Speaks asyncio gRPC to Triton: the fields of a request in, pieces of answers out.

Written on the protocol's own messages, since a piece of a stream is worth few objects: the gateway shares the
model's cores.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import struct
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
import numpy as np
from tritonclient.grpc import service_pb2 as pb

from pagetide.gateway.errors import ApiError, of_text, of_triton, refused
from pagetide.gateway.servers import Server, Servers
from pagetide.tracing import TRACEPARENT, valid

log = logging.getLogger("pagetide.gateway")

Answer = TypeVar("Answer")

_PAUSES_S = (0.0, 0.5, 2.0, 8.0)  # before each word that a request is to end
_LAST_WORDS_S = 1.0  # of a gateway that ends
_END_S = 5.0  # in which a stream ends behind its last response
_ADMIN_HEADER = "triton-grpc-protocol-admin-token"
_PIECE = (
    "text_output",
    "finish_reason",
    "sequence_index",
    "num_input_tokens",
    "num_output_tokens",
    "num_cached_tokens",
)


@dataclass(slots=True)
class Piece:
    """What one response says: new text of one answer.

    finish_reason: empty until the answer has ended. logprobs: the contract's JSON, if asked for.
    """

    index: int
    text: str
    finish_reason: str
    num_prompt_tokens: int
    num_tokens: int
    num_cached_tokens: int
    logprobs: dict[str, Any] | None = None


@dataclass(frozen=True)
class Generation:
    """One prompt for the model. prompt: text_input, messages (and tools, ...) or input_ids by tensor name.

    fields: everything else, by the contract's names.
    """

    model: str
    request_id: str
    prompt: Mapping[str, Any]
    fields: Mapping[str, Any]


class Triton:
    """One or several Tritons with the same models; prompts that begin alike go to the same.

    What one cannot serve because it or its engine is not there, or is full, goes to the next: nothing has
    come of it, and to ask a model twice harms nobody.

    admin_token: for Tritons that tell which models they have only to who may manage them.
    """

    def __init__(self, urls: Iterable[str], admin_token: str = ""):
        self.servers = Servers(urls)
        self._admin = ((_ADMIN_HEADER, admin_token),) if admin_token else ()
        self._prefixes: dict[str, str] = {}  # of the names of what a model is made of
        self._endings: set[asyncio.Future[None]] = set()

    async def close(self) -> None:
        if self._endings:
            await asyncio.wait(self._endings, timeout=_LAST_WORDS_S)
        for ending in self._endings:
            ending.cancel()
        await self.servers.close()

    async def _first_good(self, ask: Callable[[Any], Awaitable[Answer]]) -> Answer:
        """What the first server that serves answers to a call with its stub. Raises ApiError."""
        servers = self.servers.in_turn()
        for server in servers[:-1]:
            try:
                return await ask(server.stub)
            except ApiError as error:
                if error.status != 503:
                    raise
                server.rest(error.message)
        return await ask(servers[-1].stub)

    async def generate(self, generation: Generation) -> AsyncIterator[Piece]:
        """The pieces of all answers to a prompt, as they come.

        Whoever leaves the iterator before its end frees the request: the stream's cancelling reaches an
        ensemble with the next piece, the message by name at once. Raises ApiError.
        """
        servers = self.servers.for_prompt(generation.prompt)
        for server in servers[:-1]:
            has_begun = False
            try:
                async with contextlib.aclosing(self._pieces(server, generation)) as pieces:
                    async for piece in pieces:
                        has_begun = True
                        yield piece
                return
            except ApiError as error:
                if has_begun or error.status not in (429, 503):
                    raise
                if error.status == 503:
                    server.rest(error.message)
        async with contextlib.aclosing(self._pieces(servers[-1], generation)) as pieces:
            async for piece in pieces:
                yield piece

    async def _pieces(self, server: Server, generation: Generation) -> AsyncGenerator[Piece, None]:
        server.num_open += 1
        try:
            async with contextlib.aclosing(self._answer(server.stub, generation)) as pieces:
                async for piece in pieces:
                    yield piece
        finally:
            server.num_open -= 1

    async def _answer(self, stub: Any, generation: Generation) -> AsyncGenerator[Piece, None]:
        logprobs = {"logprobs", "prompt_logprobs"} & generation.fields.keys()
        outputs = (*_PIECE, "logprobs") if logprobs else _PIECE
        # The header `triton_grpc_error` would give errors codes, but it makes Triton 2.51 crash.
        parent = valid(generation.fields.get(TRACEPARENT))  # for Triton's own spans, if it makes any
        call = stub.ModelStreamInfer(
            _once(_request(generation, outputs)), metadata=((TRACEPARENT, parent),) if parent else None
        )
        is_whole = False
        try:
            async for response in call:
                if response.error_message:
                    is_whole = True
                    raise of_text(response.error_message)
                answer = response.infer_response
                if answer.outputs:
                    yield _piece(answer)
                if answer.parameters["triton_final_response"].bool_param:
                    is_whole = True
                    return
            raise ApiError(503, "the answer has ended before it was whole; try again")
        except grpc.aio.AioRpcError as error:
            is_whole = True
            raise of_triton(error.code(), error.details() or str(error.code())) from None
        finally:
            if is_whole:
                await _let_end(call)
            else:
                call.cancel()
                # On a task of its own: whoever leaves may be cancelled, and then could not wait for it.
                ending = asyncio.ensure_future(self._end(stub, generation))
                self._endings.add(ending)
                ending.add_done_callback(self._endings.discard)

    async def _end(self, stub: Any, generation: Generation) -> None:
        """Ends a request by its name, on the server that has it. More than once: it may still be on its way
        to the engine, or be run again by one that has just started.
        """
        name = self._prefixes.get(generation.model, "") + "llm_unary"
        request = pb.ModelInferRequest(model_name=name, id=generation.request_id)
        _add(request, "cancel", "BOOL", (1, 1), b"\1")
        for pause in _PAUSES_S:
            await asyncio.sleep(pause)
            try:
                await stub.ModelInfer(request, timeout=5)
            except grpc.aio.AioRpcError as error:
                log.warning("%s could not be ended: %s", generation.request_id, error.details())

    async def tokenize(self, model: str, prompt: Mapping[str, Any]) -> list[int]:
        """The token ids of one prompt: {"text_input": text} or {"messages": ..., ...}."""
        request = pb.ModelInferRequest(model_name=self._prefixes.get(model, "") + "preprocessing")
        for name, value in prompt.items():
            _add_value(request, "QUERY" if name == "text_input" else name, value)
        for name in ("INPUT_ID", "REQUEST_INPUT_LEN"):
            request.outputs.add(name=name)
        found = await self._infer(request)
        return np.frombuffer(found["INPUT_ID"], np.int32)[: _number(found["REQUEST_INPUT_LEN"])].tolist()

    async def detokenize(self, model: str, ids: list[int]) -> str:
        """The text of tokens, special ones included."""
        request = pb.ModelInferRequest(model_name=self._prefixes.get(model, "") + "postprocessing")
        _add(request, "TOKENS_BATCH", "INT32", (1, 1, len(ids)), np.array(ids, np.int32).tobytes())
        _add(request, "SEQUENCE_LENGTH", "INT32", (1, 1), np.array([len(ids)], np.int32).tobytes())
        _add(request, "SKIP_SPECIAL_TOKENS", "BOOL", (1, 1), b"\0")
        request.outputs.add(name="OUTPUT")
        return _text((await self._infer(request))["OUTPUT"])

    async def models(self) -> list[str]:
        """The models that take chats and stream: those that this gateway can serve."""
        return await self._first_good(self._models)

    async def _models(self, stub: Any) -> list[str]:
        try:
            index = await stub.RepositoryIndex(
                pb.RepositoryIndexRequest(ready=True), timeout=5, metadata=self._admin
            )
            names = sorted(model.name for model in index.models)
            configs = [
                (await stub.ModelConfig(pb.ModelConfigRequest(name=name), timeout=5)).config for name in names
            ]
        except grpc.aio.AioRpcError as error:
            raise ApiError(503, f"Triton cannot be asked: {error.details()}") from None
        found = {config.name: prefix for config in configs if (prefix := _prefix(config)) is not None}
        self._prefixes |= found
        return list(found)

    async def _infer(self, request: Any) -> dict[str, bytes]:
        """The outputs that are asked for, by name."""

        async def ask(stub: Any) -> dict[str, bytes]:
            try:
                response = await stub.ModelInfer(request, timeout=60)
            except grpc.aio.AioRpcError as error:
                raise of_triton(error.code(), error.details() or str(error.code())) from None
            return _outputs(response)

        return await self._first_good(ask)


def _prefix(config: Any) -> str | None:
    """What the names of a model's steps begin with, empty for the models that are there from the beginning;
    None if it takes no chats or does not stream.
    """
    if not any(tensor.name == "messages" for tensor in config.input):
        return None
    names = (step.model_name for step in config.ensemble_scheduling.step)
    return next((name.removesuffix("llm") for name in names if name == "llm" or name.endswith("_llm")), None)


async def _let_end(call: Any) -> None:
    """Reads a stream to its end: of those that are cancelled behind their last response Triton 2.51 loses
    spans.
    """

    async def read() -> None:
        async for _ in call:
            pass

    try:
        await asyncio.wait_for(read(), _END_S)
    except (grpc.aio.AioRpcError, asyncio.TimeoutError):
        call.cancel()


async def _once(request: Any) -> AsyncIterator[Any]:
    yield request


def _request(generation: Generation, outputs: Iterable[str]) -> Any:
    request = pb.ModelInferRequest(model_name=generation.model, id=generation.request_id)
    for name, value in generation.prompt.items():
        _add_value(request, name, value)
    counts = {f"return_{name}": True for name in _PIECE if name.startswith("num_")}
    _add_value(request, "sampling_parameters", json.dumps({**generation.fields, **counts}))
    for name in outputs:
        request.outputs.add(name=name)
    # An answer's last response is told as such, not by one more that is empty.
    request.parameters["triton_enable_empty_final_response"].bool_param = True
    return request


def _add_value(request: Any, name: str, value: Any) -> None:
    """A tensor of one prompt: a text, a truth value, or a list of token ids."""
    if isinstance(value, bool):
        _add(request, name, "BOOL", (1, 1), bytes([value]))
    elif isinstance(value, list) and name == "input_ids":
        _add(request, name, "INT32", (1, len(value)), np.array(value, np.int32).tobytes())
    else:
        try:
            text = (value if isinstance(value, str) else json.dumps(value)).encode()
        except UnicodeEncodeError:
            raise refused(f"{name} has half of a surrogate pair, which is no character") from None
        _add(request, name, "BYTES", (1, 1), struct.pack("<I", len(text)) + text)


def _add(request: Any, name: str, dtype: str, shape: tuple[int, ...], data: bytes) -> None:
    request.inputs.add(name=name, datatype=dtype, shape=shape)
    request.raw_input_contents.append(data)


def _outputs(response: Any) -> dict[str, bytes]:
    return {
        tensor.name: data for tensor, data in zip(response.outputs, response.raw_output_contents, strict=True)
    }


def _piece(response: Any) -> Piece:
    found = _outputs(response)
    logprobs = found.get("logprobs")
    return Piece(
        index=_number(found["sequence_index"]),
        text=_text(found["text_output"]),
        finish_reason=_text(found["finish_reason"]),
        num_prompt_tokens=_number(found["num_input_tokens"]),
        num_tokens=_number(found["num_output_tokens"]),
        num_cached_tokens=_number(found["num_cached_tokens"]),
        logprobs=json.loads(_text(logprobs)) if logprobs else None,
    )


def _number(data: bytes) -> int:
    return int.from_bytes(data[:4], "little", signed=True)


def _text(data: bytes) -> str:
    return data[4:].decode("utf-8", "replace")
