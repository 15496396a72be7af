"""Tool calls in a model's text: found while it streams, in the format that the model was trained on.

hermes (Qwen too)   <tool_call>{"name": ..., "arguments": {...}}</tool_call>
llama3              <|python_tag|>{"name": ..., "parameters": {...}}; ..., or without the tag
mistral             [TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Protocol

FORMATS = ("hermes", "llama3", "mistral")
_BEGIN = {"hermes": "<tool_call>", "llama3": "<|python_tag|>", "mistral": "[TOOL_CALLS]"}
_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class Call:
    """Part of a call: name in its first part, arguments as JSON text."""

    index: int
    name: str
    arguments: str


class Parser(Protocol):
    """Turns text, as it comes, into texts and calls, in their order. end(): what was held back."""

    def take(self, text: str) -> list[str | Call]: ...

    def end(self) -> list[str | Call]: ...


class PlainText:
    """An answer without calls."""

    def take(self, text: str) -> list[str | Call]:
        return [text] if text else []

    def end(self) -> list[str | Call]:
        return []


class MarkedCalls:
    """Calls behind a marker, in one of FORMATS. What cannot be read as a call stays text."""

    def __init__(self, format_name: str):
        self._format = format_name
        self._begin = _BEGIN[format_name]
        self._held = ""
        self._is_inside = False
        self._has_begun = self._is_after_call = False
        self._num_calls = 0

    def take(self, text: str) -> list[str | Call]:
        self._held += text
        found: list[str | Call] = []
        while (more := self._step()) is not None:
            found += more
        return found

    def end(self) -> list[str | Call]:
        found: list[str | Call] = []
        if self._is_inside and (calls := self._read(self._held)) is not None:
            found += calls
        elif self._held:
            found.append((self._begin if self._is_inside and not self._is_bare() else "") + self._held)
        self._held, self._is_inside = "", False
        return found

    def _is_bare(self) -> bool:
        return self._format == "llama3" and self._held.lstrip().startswith("{")

    def _step(self) -> list[str | Call] | None:
        """What can be told by now; None: nothing more."""
        return self._inside() if self._is_inside else self._outside()

    def _outside(self) -> list[str | Call] | None:
        if self._format == "llama3" and not self._has_begun:
            start = self._held.lstrip()
            if not start:
                return None
            self._has_begun = not self._begin.startswith(start)
            if start.startswith("{"):
                self._is_inside = True
                return []
        if self._is_after_call:
            self._held = self._held.lstrip()  # between calls, it is no text
            self._is_after_call = not self._held
        at = self._held.find(self._begin)
        if at >= 0:
            text, self._held = self._held[:at], self._held[at + len(self._begin) :]
            self._is_inside = self._has_begun = True
            return [text] if text else []
        keep = _overlap(self._held, self._begin)
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return [text] if text else None

    def _inside(self) -> list[str | Call] | None:
        """hermes has an end marker; the others' calls end with the answer."""
        if self._format != "hermes":
            return None
        end = "</tool_call>"
        at = self._held.find(end)
        if at < 0:
            return None
        body, self._held = self._held[:at], self._held[at + len(end) :]
        calls = self._read(body)
        self._is_inside, self._is_after_call = False, calls is not None
        return [f"{self._begin}{body}{end}"] if calls is None else calls

    def _read(self, body: str) -> list[str | Call] | None:
        """The calls that a text consists of; None if it is something else."""
        objects: list[Any] = []
        rest = body.strip()
        while rest:
            try:
                value, used = _DECODER.raw_decode(rest)
            except (ValueError, RecursionError):  # a model may open a thousand brackets
                return None
            objects += value if isinstance(value, list) else [value]
            rest = rest[used:].lstrip(" \n\r\t;")
        if not objects or not all(map(_is_call, objects)):
            return None
        calls = [_call(self._num_calls + i, one) for i, one in enumerate(objects)]
        self._num_calls += len(calls)
        return list(calls)


class NamedCall:
    """The whole answer is the arguments of one function."""

    def __init__(self, name: str):
        self._name = name

    def take(self, text: str) -> list[str | Call]:
        name, self._name = self._name, ""
        return [Call(0, name, text)] if name or text else []

    def end(self) -> list[str | Call]:
        return []


class ListedCalls:
    """The whole answer is a JSON list of calls: each is known as soon as it is whole."""

    def __init__(self) -> None:
        self._held = ""
        self._num_calls = 0

    def take(self, text: str) -> list[str | Call]:
        self._held += text
        found: list[str | Call] = []
        while "}" in self._held:
            start = self._held.lstrip(" \n\r\t[,")
            try:
                value, used = _DECODER.raw_decode(start)
            except (ValueError, RecursionError):
                break
            if not _is_call(value):
                break
            found.append(_call(self._num_calls, value))
            self._num_calls += 1
            self._held = start[used:]
        return found

    def end(self) -> list[str | Call]:
        """A call that the answer's end has cut is text."""
        left = self._held.strip(" \n\r\t[],")
        return [left] if left else []


def _is_call(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("name"), str)


def _call(index: int, found: dict[str, Any]) -> Call:
    """JSON may name half of a surrogate pair, which no client could be sent as it is."""
    arguments = found.get("arguments", found.get("parameters", {}))
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    name, arguments = (text.encode("utf-8", "replace").decode() for text in (found["name"], arguments))
    return Call(index, name, arguments)


def _overlap(text: str, marker: str) -> int:
    """How many characters at the end of a text may be the beginning of a marker."""
    for size in range(min(len(text), len(marker) - 1), 0, -1):
        if marker.startswith(text[-size:]):
            return size
    return 0


class Thinking:
    """Splits an answer at </think>. begins: the prompt has opened the thoughts already."""

    def __init__(self, begins: bool):
        self._held = ""
        self._state = "thinking" if begins else "start"

    def take(self, text: str) -> tuple[str, str]:
        """(thoughts, answer) of the new text."""
        if self._state == "answer":
            return "", text
        if self._state == "gap":
            text = text.lstrip("\n")
            self._state = "answer" if text else "gap"
            return "", text
        self._held += text
        if self._state == "start":
            start = self._held.lstrip()
            if "<think>".startswith(start):
                return "", ""
            if not start.startswith("<think>"):
                return "", self.end()[1]
            self._held, self._state = start.removeprefix("<think>"), "thinking"
        at = self._held.find("</think>")
        if at >= 0:
            thoughts, answer = self._held[:at], self._held[at + len("</think>") :].lstrip("\n")
            self._held, self._state = "", "answer" if answer else "gap"
            return thoughts, answer
        keep = _overlap(self._held, "</think>")
        thoughts, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return thoughts, ""

    def end(self) -> tuple[str, str]:
        """What was held back."""
        held, self._held = self._held, ""
        was, self._state = self._state, "answer"
        return (held, "") if was == "thinking" else ("", held)
