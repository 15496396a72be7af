"""What a client gets of the choices of its request, as chats and completions have it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any, Protocol

from pagetide.gateway.answers import Usage
from pagetide.gateway.bodies import StreamOptions
from pagetide.gateway.errors import ApiError

_DONE = b"data: [DONE]\n\n"


def event(value: dict[str, Any], name: str = "") -> bytes:
    """A server-sent event."""
    data = b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
    return b"event: %s\n%s" % (name.encode(), data) if name else data


class Shape(Protocol):
    """One object, or server-sent events, each as bytes."""

    def begin(self) -> Iterator[bytes]:
        """What comes before the first choice."""

    def take(self, choice: dict[str, Any]) -> Iterator[bytes]:
        """What comes of a choice."""

    def end(self) -> Iterator[bytes]:
        """What comes last."""

    def fail(self, error: ApiError) -> Iterator[bytes]:
        """What comes last if the answer has failed in its midst: the status has been sent."""

    def whole(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """One object with everything that the choices say."""


class Chunks:
    """Shape of chats and completions. kind: `chat.completion` or `text_completion`."""

    def __init__(self, kind: str, request_id: str, model: str, usage: Usage, options: StreamOptions):
        self._kind = kind
        self._head = {"id": request_id, "created": int(time.time()), "model": model}
        self._chunk_head = {**self._head, "object": f"{kind}.chunk" if kind == "chat.completion" else kind}
        self._usage = usage
        self._options = options

    def begin(self) -> Iterator[bytes]:
        return iter(())

    def take(self, choice: dict[str, Any]) -> Iterator[bytes]:
        usage: dict[str, Any] = {}
        if self._options.include_usage:
            usage = {"usage": self._usage.shown() if self._options.continuous_usage_stats else None}
        yield event({**self._chunk_head, "choices": [choice], **usage})

    def end(self) -> Iterator[bytes]:
        if self._options.include_usage:
            yield event({**self._chunk_head, "choices": [], "usage": self._usage.shown()})
        yield _DONE

    def fail(self, error: ApiError) -> Iterator[bytes]:
        yield event(error.body())
        yield _DONE

    def whole(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        joined: dict[int, dict[str, Any]] = {}
        for chunk in choices:
            index = chunk["index"]
            if "delta" in chunk:
                _join_chat(joined.setdefault(index, _empty_chat(index)), chunk)
            else:
                _join_completion(joined.setdefault(index, {**chunk, "text": "", "logprobs": None}), chunk)
        ordered = [joined[index] for index in sorted(joined)]
        return {**self._head, "object": self._kind, "choices": ordered, "usage": self._usage.shown()}


def _empty_chat(index: int) -> dict[str, Any]:
    message = {"role": "assistant", "content": None, "refusal": None}
    return {"index": index, "message": message, "logprobs": None, "finish_reason": None}


def _join_chat(choice: dict[str, Any], chunk: dict[str, Any]) -> None:
    message, delta = choice["message"], chunk["delta"]
    for name in ("content", "reasoning_content"):
        if delta.get(name):
            message[name] = (message.get(name) or "") + delta[name]
    for part in delta.get("tool_calls", ()):
        calls = message.setdefault("tool_calls", [])
        if part["index"] == len(calls):
            calls.append({name: value for name, value in part.items() if name != "index"})
        else:
            calls[part["index"]]["function"]["arguments"] += part["function"]["arguments"]
    _join_ends(choice, chunk)
    if choice["finish_reason"] and message["content"] is None and "tool_calls" not in message:
        message["content"] = ""


def _join_completion(choice: dict[str, Any], chunk: dict[str, Any]) -> None:
    choice["text"] += chunk["text"]
    _join_ends(choice, chunk)


def _join_ends(choice: dict[str, Any], chunk: dict[str, Any]) -> None:
    choice["finish_reason"] = chunk["finish_reason"] or choice["finish_reason"]
    if chunk["logprobs"]:
        joined = choice["logprobs"] or {name: [] for name in chunk["logprobs"]}
        choice["logprobs"] = {
            name: None if values is None else joined[name] + values
            for name, values in chunk["logprobs"].items()
        }
