"""One request on its way through the gateway.

body -> fields of the contract -> pieces from Triton -> choices -> one object, or server-sent events
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from pagetide.gateway.answers import Answers, ChatChoice, CompletionChoice, Echo
from pagetide.gateway.bodies import ChatBody, CompletionBody, GenerationBody, ResponsesBody, StreamOptions
from pagetide.gateway.errors import ApiError, failed, named, refused
from pagetide.gateway.fields import chat_prompt, fields_of, is_guided, prompts_of
from pagetide.gateway.health import Health
from pagetide.gateway.inputs import OF_RESPONSES, chat_of
from pagetide.gateway.models import Chosen, Models
from pagetide.gateway.responses import ResponseShape
from pagetide.gateway.shapes import Chunks, Shape
from pagetide.gateway.streams import merged
from pagetide.gateway.tools import ToolUse
from pagetide.gateway.triton import Generation, Triton
from pagetide.tracing import TRACEPARENT

log = logging.getLogger("pagetide.gateway")
_CLIENT_LEFT = 499


class Gateway:
    """What the routes share."""

    def __init__(self, triton: Triton, call_format: str, lora_dir: Path | None = None):
        self.triton = triton
        self.models = Models(triton, call_format, lora_dir)
        self.health = Health(triton)

    async def chat(self, body: ChatBody, request: Request) -> Response:
        request_id = f"chatcmpl-{uuid.uuid4().hex}"
        generation, answers, model = await self._begin_chat(body, request, request_id)
        options = body.stream_options or StreamOptions()
        shape = Chunks("chat.completion", request_id, model, answers.usage, options)
        return await self._answer(body, request, answers, shape, [generation])

    async def respond(self, body: ResponsesBody, request: Request) -> Response:
        chat = chat_of(body)
        request_id = f"resp_{uuid.uuid4().hex}"
        try:
            generation, answers, model = await self._begin_chat(chat, request, request_id)
            shape = ResponseShape(body, request_id, model, answers.usage)
            return await self._answer(chat, request, answers, shape, [generation])
        except ApiError as error:
            error.param = OF_RESPONSES.get(error.param or "", error.param)
            raise

    async def _begin_chat(
        self, body: ChatBody, request: Request, request_id: str
    ) -> tuple[Generation, Answers, str]:
        """The prompt, what makes choices of its pieces, and the name that the client knows the model by."""
        chosen = await self.models.choose(body.model)
        model = chosen.triton
        habits = await self.models.habits(model, body.chat_template_kwargs)
        tools = ToolUse(body, habits.calls)
        fields = {**_fields(body, chosen), **_of_request(request), **tools.fields()}
        if tools.must_be_called and body.response_format and body.response_format.type != "text":
            raise refused("response_format does not go with tools that must be called", "response_format")
        prompt = chat_prompt(body, tools.shown())

        def make_choice(index: int) -> ChatChoice:
            thinking = None if is_guided(fields) else habits.thinking(body)
            return ChatChoice(index, tools, thinking, body.top_logprobs or 0)

        generation = Generation(model, request_id, prompt, fields)
        return generation, Answers(body.n or 1, make_choice), chosen.shown

    async def complete(self, body: CompletionBody, request: Request) -> Response:
        chosen = await self.models.choose(body.model)
        model = chosen.triton
        fields, prompts = {**_fields(body, chosen), **_of_request(request)}, prompts_of(body)
        request_id = f"cmpl-{uuid.uuid4().hex}"
        echoes = [Echo(await self._text_of(model, prompt)) if body.echo else None for prompt in prompts]
        per_prompt = body.n or 1

        def make_choice(index: int) -> CompletionChoice:
            return CompletionChoice(index, echoes[index // per_prompt], body.logprobs is not None)

        answers = Answers(per_prompt, make_choice, first_leads=bool(body.echo) and body.logprobs is not None)
        options = body.stream_options or StreamOptions()
        shape = Chunks("text_completion", request_id, chosen.shown, answers.usage, options)
        generations = [
            Generation(model, f"{request_id}-{i}", prompt, fields) for i, prompt in enumerate(prompts)
        ]
        return await self._answer(body, request, answers, shape, generations)

    async def _text_of(self, model: str, prompt: dict[str, Any]) -> str:
        if "text_input" in prompt:
            return prompt["text_input"]
        return await self.triton.detokenize(model, prompt["input_ids"])

    async def _answer(
        self,
        body: GenerationBody,
        request: Request,
        answers: Answers,
        shape: Shape,
        generations: list[Generation],
    ) -> Response:
        choices = self._choices(answers, generations)
        try:
            # Errors that come before the first piece have a status of their own.
            first = await _unless_left(request, anext(choices, None))
            if body.stream:
                events = _events(shape, first, choices)
                return _EventStream(events, media_type="text/event-stream", headers=_NO_CACHE)
            found = [first] if first else []
            found += await _unless_left(request, _all(choices))
        except ApiError as error:
            await choices.aclose()
            raise named(error, body.model_fields_set | (body.model_extra or {}).keys()) from None
        except _ClientLeftError:
            await choices.aclose()
            log.info("%s: the client has left", generations[0].request_id)
            return Response(status_code=_CLIENT_LEFT)
        return JSONResponse(shape.whole(found))

    async def _choices(
        self, answers: Answers, generations: list[Generation]
    ) -> AsyncIterator[dict[str, Any]]:
        streams = [self.triton.generate(one) for one in generations]
        async with contextlib.aclosing(merged(streams)) as pieces:
            async for prompt, piece in pieces:
                self.health.saw_life()
                for choice in answers.take(prompt, piece):
                    yield choice


_NO_CACHE = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class _EventStream(StreamingResponse):
    """Ends its events whenever it ends itself: who has left may not have read what was ready long ago."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.body_iterator.aclose()  # type: ignore[union-attr]


class _ClientLeftError(Exception):
    """Nobody waits for the answer."""


def _fields(body: GenerationBody, chosen: Chosen) -> dict[str, Any]:
    """The contract's, with the adapter that the model's name means. Raises ApiError."""
    fields = fields_of(body)
    named = fields.get("lora_name") or fields.get("lora_task_id")
    if chosen.lora_name and named and named != chosen.lora_name:
        raise refused(f"model names the adapter {chosen.lora_name!r}, and the request {named!r}", "lora_name")
    return fields | ({"lora_name": chosen.lora_name} if chosen.lora_name else {})


def _of_request(request: Request) -> dict[str, str]:
    """Fields that are not in the body: where there are keys, who has one is one user, whatever names his
    requests have; and the trace that this is part of.
    """
    names = ("user", TRACEPARENT)
    return {name: value for name in names if (value := getattr(request.state, name, ""))}


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
    shape: Shape, first: dict[str, Any] | None, choices: AsyncIterator[dict[str, Any]]
) -> AsyncIterator[bytes]:
    """Server-sent events; an error in the midst is one too, since the status has been sent."""
    try:
        for event in shape.begin():
            yield event
        if first:
            for event in shape.take(first):
                yield event
        async for choice in choices:
            for event in shape.take(choice):
                yield event
        for event in shape.end():
            yield event
    except ApiError as error:
        for event in shape.fail(error):
            yield event
    except Exception:
        log.exception("a stream failed")
        for event in shape.fail(failed()):
            yield event
    finally:
        await choices.aclose()  # type: ignore[attr-defined]
