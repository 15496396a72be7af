"""Answers in the shape of the Responses API: an object whose output is a list of items, and the events that
tell how it grows.

https://platform.openai.com/docs/api-reference/responses-streaming
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from typing import Any

from pagetide.gateway.answers import Usage
from pagetide.gateway.bodies import ChosenFunction, ResponsesBody
from pagetide.gateway.errors import ApiError
from pagetide.gateway.shapes import event

# By the type of an item: what its id begins with; what its content is called, a part of text.
_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc"}
_PARTS = {"message": "output_text", "reasoning": "reasoning_text"}
_FAILURES = {429: "rate_limit_exceeded", 400: "invalid_prompt"}

Event = dict[str, Any]


class ResponseShape:
    """Shape of one answer (shapes.Shape), made of a chat's choices."""

    def __init__(self, body: ResponsesBody, request_id: str, model: str, usage: Usage):
        self._usage = usage
        self._num_events = 0
        self._output: list[dict[str, Any]] = []
        self._scored: list[dict[str, Any]] = []  # tokens whose text is still to come, if they have any
        self._is_cut = False
        self._told = _told(body, request_id, model)

    def begin(self) -> Iterator[bytes]:
        for kind in ("response.created", "response.in_progress"):
            yield _encoded(self._event(kind, response=self._object("in_progress")))

    def take(self, choice: dict[str, Any]) -> Iterator[bytes]:
        return map(_encoded, self._grow(choice))

    def end(self) -> Iterator[bytes]:
        yield from map(_encoded, self._finish())
        status = "incomplete" if self._is_cut else "completed"
        yield _encoded(self._event(f"response.{status}", response=self._object(status)))

    def fail(self, error: ApiError) -> Iterator[bytes]:
        told = {"code": _FAILURES.get(error.status, "server_error"), "message": error.message}
        yield _encoded(self._event("response.failed", response={**self._object("failed"), "error": told}))

    def whole(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        for choice in choices:
            for _ in self._grow(choice):
                pass
        for _ in self._finish():
            pass
        return self._object("incomplete" if self._is_cut else "completed")

    def _grow(self, choice: dict[str, Any]) -> Iterator[Event]:
        """What a choice adds to the output, told event by event: each says how things are at its time."""
        delta = choice["delta"]
        self._scored += (choice["logprobs"] or {}).get("content") or []
        if thoughts := delta.get("reasoning_content"):
            yield from self._add_text("reasoning", thoughts)
        if text := delta.get("content"):
            yield from self._add_text("message", text)
        for call in delta.get("tool_calls", ()):
            yield from self._add_call(call)
        self._is_cut = self._is_cut or choice["finish_reason"] == "length"

    def _add_text(self, kind: str, text: str) -> Iterator[Event]:
        if not self._is_open(kind):
            yield from self._open(_text_item(kind))
            part: dict[str, Any] = {"type": _PARTS[kind], "text": ""}
            if kind == "message":
                part |= {"annotations": [], "logprobs": []}
            self._output[-1]["content"].append(part)
            yield self._of_item("response.content_part.added", content_index=0, part=part)
        part = self._output[-1]["content"][0]
        part["text"] += text
        scored, self._scored = self._scored, []
        more: dict[str, Any] = {}
        if kind == "message":
            part["logprobs"] += scored
            more["logprobs"] = scored
        yield self._of_item(f"response.{_PARTS[kind]}.delta", content_index=0, delta=text, **more)

    def _add_call(self, call: dict[str, Any]) -> Iterator[Event]:
        function, self._scored = call["function"], []
        if "name" in function:
            item = {"type": "function_call", "call_id": call["id"], "name": function["name"], "arguments": ""}
            yield from self._open(item)
        if function["arguments"]:
            self._output[-1]["arguments"] += function["arguments"]
            yield self._of_item("response.function_call_arguments.delta", delta=function["arguments"])

    def _is_open(self, kind: str) -> bool:
        """Whether the last item is one of this kind."""
        return bool(self._output) and self._output[-1]["type"] == kind

    def _open(self, item: dict[str, Any]) -> Iterator[Event]:
        yield from self._close("completed")
        number = f"{_PREFIXES[item['type']]}_{uuid.uuid4().hex}"
        self._output.append({"id": number, **item, "status": "in_progress"})
        yield self._of_list("response.output_item.added")

    def _close(self, status: str) -> Iterator[Event]:
        """Ends the last item, if there is any."""
        if not self._output:
            return
        item = self._output[-1]
        item["status"] = status
        if item["type"] == "function_call":
            told = {name: item[name] for name in ("name", "arguments")}
            yield self._of_item("response.function_call_arguments.done", **told)
        else:
            part = item["content"][0]
            more = {"logprobs": part["logprobs"]} if item["type"] == "message" else {}
            yield self._of_item(f"response.{part['type']}.done", content_index=0, text=part["text"], **more)
            yield self._of_item("response.content_part.done", content_index=0, part=part)
        yield self._of_list("response.output_item.done")

    def _finish(self) -> Iterator[Event]:
        self._scored = []
        if not self._output:
            yield from self._add_text("message", "")
        yield from self._close("incomplete" if self._is_cut else "completed")

    def _of_list(self, kind: str) -> Event:
        """An event of the output, about its last item."""
        return self._event(kind, output_index=len(self._output) - 1, item=self._output[-1])

    def _of_item(self, kind: str, **more: Any) -> Event:
        """An event within the last item."""
        return self._event(kind, item_id=self._output[-1]["id"], output_index=len(self._output) - 1, **more)

    def _event(self, kind: str, **more: Any) -> Event:
        self._num_events += 1
        return {"type": kind, "sequence_number": self._num_events - 1, **more}

    def _object(self, status: str) -> dict[str, Any]:
        is_done = status in ("completed", "incomplete")
        return {
            **self._told,
            "status": status,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": self._output,
            "usage": _usage(self._usage) if is_done else None,
        }


def _encoded(found: Event) -> bytes:
    return event(found, found["type"])


def _text_item(kind: str) -> dict[str, Any]:
    more: dict[str, Any] = {"role": "assistant"} if kind == "message" else {"summary": []}
    return {"type": kind, **more, "content": []}


def _usage(usage: Usage) -> dict[str, Any]:
    """Tokens of thoughts are not told apart."""
    told = usage.shown()
    return {
        "input_tokens": told["prompt_tokens"],
        "input_tokens_details": {**told["prompt_tokens_details"], "cache_write_tokens": 0},
        "output_tokens": told["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": told["total_tokens"],
    }


def _told(body: ResponsesBody, request_id: str, model: str) -> dict[str, Any]:
    """What a response repeats of its request."""
    wanted = body.text and body.text.format
    shown = wanted.model_dump(by_alias=True, exclude_none=True) if wanted else {"type": "text"}
    choice = body.tool_choice
    return {
        "id": request_id,
        "object": "response",
        "created_at": int(time.time()),
        "model": model,
        "background": False,
        "error": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "store": False,
        "temperature": body.temperature,
        "text": {"format": shown},
        "tool_choice": choice.model_dump() if isinstance(choice, ChosenFunction) else choice or "auto",
        "tools": [tool.model_dump() for tool in body.tools or ()],
        "top_logprobs": body.top_logprobs,
        "top_p": body.top_p,
        "truncation": "disabled",
    }
