"""The OpenAI API over Triton: routes, and the way of one request through them.

body -> fields of the contract -> pieces from Triton -> choices -> one object, or server-sent events
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response, StreamingResponse

from pagetide.gateway.answers import Answer, ChatChoice, CompletionChoice
from pagetide.gateway.bodies import ChatBody, CompletionBody, DetokenizeBody, GenerationBody, TokenizeBody
from pagetide.gateway.door import Door, Rules
from pagetide.gateway.errors import ApiError, named, refused
from pagetide.gateway.fields import fields_of, prompts_of
from pagetide.gateway.health import Health
from pagetide.gateway.models import Models
from pagetide.gateway.streams import merged
from pagetide.gateway.tools import ToolUse
from pagetide.gateway.triton import Generation, Triton

log = logging.getLogger("pagetide.gateway")
_CLIENT_LEFT = 499


class Gateway:
    """What the routes share."""

    def __init__(self, triton: Triton, call_format: str):
        self.triton = triton
        self.models = Models(triton, call_format)
        self.health = Health(triton)

    async def chat(self, body: ChatBody, request: Request) -> Response:
        model = await self.models.find(body.model)
        habits = await self.models.habits(model)
        tools = ToolUse(body, habits.calls)
        fields = {**fields_of(body), **tools.fields()}
        if tools.fields() and body.response_format and body.response_format.type != "text":
            raise refused("response_format does not go with tools that must be called", "response_format")
        prompt: dict[str, Any] = {
            "messages": body.messages,
            "add_generation_prompt": body.add_generation_prompt and not body.continue_final_message,
        }
        if body.continue_final_message:
            prompt["continue_final_message"] = True
        if (shown := tools.shown()) is not None:
            prompt["tools"] = shown
        if body.chat_template_kwargs:
            prompt["chat_template_kwargs"] = body.chat_template_kwargs
        request_id = f"chatcmpl-{uuid.uuid4().hex}"

        def make_choice(index: int) -> ChatChoice:
            return ChatChoice(index, tools, habits.thinking(), body.top_logprobs or 0)

        answer = Answer("chat.completion", request_id, model, body.n or 1, make_choice)
        return await self._answer(body, request, answer, [Generation(model, request_id, prompt, fields)])

    async def complete(self, body: CompletionBody, request: Request) -> Response:
        model = await self.models.find(body.model)
        fields, prompts = fields_of(body), prompts_of(body)
        request_id = f"cmpl-{uuid.uuid4().hex}"
        echoed = [await self._text_of(prompt) if body.echo else "" for prompt in prompts]
        per_prompt = body.n or 1

        def make_choice(index: int) -> CompletionChoice:
            return CompletionChoice(index, echoed[index // per_prompt], body.logprobs is not None)

        answer = Answer("text_completion", request_id, model, per_prompt, make_choice)
        generations = [
            Generation(model, f"{request_id}-{i}", prompt, fields) for i, prompt in enumerate(prompts)
        ]
        return await self._answer(body, request, answer, generations)

    async def _text_of(self, prompt: dict[str, Any]) -> str:
        return prompt.get("text_input") or await self.triton.detokenize(prompt["input_ids"])

    async def _answer(
        self, body: GenerationBody, request: Request, answer: Answer, generations: list[Generation]
    ) -> Response:
        choices = self._choices(answer, generations)
        try:
            # Errors that come before the first piece have a status of their own.
            first = await _unless_left(request, anext(choices, None))
            if body.stream:
                shows_usage = body.stream_options is not None and body.stream_options.include_usage
                events = _events(answer, first, choices, shows_usage)
                return StreamingResponse(events, media_type="text/event-stream", headers=_NO_CACHE)
            found = [first] if first else []
            found += await _unless_left(request, _all(choices))
        except ApiError as error:
            await choices.aclose()
            raise named(error, body.model_fields_set | (body.model_extra or {}).keys()) from None
        except _ClientLeftError:
            await choices.aclose()
            log.info("%s: the client has left", generations[0].request_id)
            return Response(status_code=_CLIENT_LEFT)
        return JSONResponse(answer.whole(found))

    async def _choices(self, answer: Answer, generations: list[Generation]) -> AsyncIterator[dict[str, Any]]:
        streams = [self.triton.generate(one) for one in generations]
        async with contextlib.aclosing(merged(streams)) as pieces:
            async for prompt, piece in pieces:
                self.health.saw_life()
                for choice in answer.take(prompt, piece):
                    yield choice


_NO_CACHE = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class _ClientLeftError(Exception):
    """Nobody waits for the answer."""


async def _unless_left(request: Request, work: Any) -> Any:
    """The result of an awaitable; raises _ClientLeftError as soon as the client is gone."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise _ClientLeftError
        return task.result()
    finally:
        for one in (task, watch):
            one.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await one


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _all(choices: AsyncIterator[dict[str, Any]]) -> list[dict[str, Any]]:
    return [choice async for choice in choices]


async def _events(
    answer: Answer, first: dict[str, Any] | None, choices: AsyncIterator[dict[str, Any]], shows_usage: bool
) -> AsyncIterator[bytes]:
    """Server-sent events; an error in the midst is one too, since the status has been sent."""
    try:
        if first:
            yield _event(answer.chunk(first, shows_usage))
        async for choice in choices:
            yield _event(answer.chunk(choice, shows_usage))
        if shows_usage:
            yield _event(answer.usage_chunk())
    except ApiError as error:
        yield _event(error.body())
    finally:
        await choices.aclose()  # type: ignore[attr-defined]
    yield b"data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def make_app(urls: list[str], rules: Rules, call_format: str = "") -> FastAPI:
    """The application, as an ASGI server runs it. urls: the gRPC addresses of Tritons."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        # gRPC's channels belong to the event loop that runs by now.
        triton = Triton(urls)
        app.state.gateway = Gateway(triton, call_format)
        watching = asyncio.ensure_future(app.state.gateway.health.watch())
        yield
        watching.cancel()
        await triton.close()

    app = FastAPI(title="Pagetide", lifespan=lifespan)
    _add_errors(app)
    _add_routes(app)
    app.add_middleware(Door, rules=rules)
    return app


def _add_routes(app: FastAPI) -> None:
    def gateway() -> Gateway:
        return app.state.gateway

    @app.post("/v1/chat/completions")
    async def chat(body: ChatBody, request: Request) -> Response:
        return await gateway().chat(body, request)

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        return await gateway().complete(body, request)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(name) for name in await gateway().models.names()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        return _model(await gateway().models.find(name))

    @app.post("/v1/embeddings")
    async def embeddings() -> None:
        raise ApiError(404, "none of the models makes embeddings", "model", "model_not_found")

    @app.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> dict[str, Any]:
        tokens = await gateway().triton.tokenize(_prompt_to_tokenize(body))
        return {"tokens": tokens, "count": len(tokens)}

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> dict[str, str]:
        return {"prompt": await gateway().triton.detokenize(body.tokens)}

    @app.get("/health")
    async def health() -> Response:
        if not gateway().health.is_good:
            raise ApiError(503, gateway().health.reason)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": int(time.time()), "owned_by": "pagetide"}


def _prompt_to_tokenize(body: TokenizeBody) -> dict[str, Any]:
    if (body.prompt is None) == (body.messages is None):
        raise refused("give either prompt or messages", "prompt")
    if body.prompt is not None:
        return {"text_input": body.prompt}
    prompt: dict[str, Any] = {"messages": body.messages, "add_generation_prompt": body.add_generation_prompt}
    if body.tools:
        prompt["tools"] = [tool.model_dump(exclude_none=True) for tool in body.tools]
    if body.chat_template_kwargs:
        prompt["chat_template_kwargs"] = body.chat_template_kwargs
    return prompt


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def known(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def wrong(request: Request, error: RequestValidationError) -> Response:
        return _of_validation(error).response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}; the API is described at /docs"
        return ApiError(error.status_code, message).response()

    @app.exception_handler(Exception)
    async def unknown(request: Request, error: Exception) -> Response:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return ApiError(500, "the gateway failed; its log says why").response()


def _of_validation(error: RequestValidationError) -> ApiError:
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return refused(f"the body is not valid JSON: {first['ctx']['error']}")
    place = [str(part) for part in first["loc"] if part != "body"]
    message = first["msg"][:1].lower() + first["msg"][1:]
    # Of a union's parts only the field is worth naming.
    name = place[0] if place else "body"
    where = ".".join(part for part in place if not part.startswith(("function-", "list[", "constrained")))
    return ApiError(422, f"{where or name}: {message}", name)
