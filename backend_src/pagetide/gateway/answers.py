"""Answers in OpenAI's shape, made of pieces as they come: chunks of a stream, or one whole object."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from pagetide.gateway.bodies import StreamOptions
from pagetide.gateway.calls import Call, Parser, Thinking
from pagetide.gateway.logprobs import chat_logprobs, completion_logprobs
from pagetide.gateway.tools import ToolUse
from pagetide.gateway.triton import Piece

# An answer that a time limit or someone else has ended is as cut as one that reached max_tokens.
_REASONS = {"stop": "stop", "length": "length", "timeout": "length", "cancelled": "length"}


class Usage:
    """Tokens of one client request. Prompts are counted once each, whatever the number of answers."""

    def __init__(self) -> None:
        self._prompts: dict[int, tuple[int, int]] = {}
        self.num_tokens = 0

    def count(self, prompt: int, piece: Piece) -> None:
        self._prompts[prompt] = (piece.num_prompt_tokens, piece.num_cached_tokens)
        self.num_tokens += piece.num_tokens

    @property
    def num_prompt_tokens(self) -> int:
        return sum(tokens for tokens, _ in self._prompts.values())

    def shown(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_tokens,
            "total_tokens": self.num_prompt_tokens + self.num_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(cached for _, cached in self._prompts.values())},
        }


class ChatChoice:
    """One answer of a chat. thinking: None where the model does not think aloud.

    num_top: how many of the likeliest tokens stand beside each.
    """

    def __init__(self, index: int, tools: ToolUse, thinking: Thinking | None, num_top: int):
        self._index = index
        self._tools = tools
        self._thinking = thinking
        self._parser: Parser = tools.parser()
        self._num_top = num_top
        self._has_begun = self._has_called = False

    def take(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """Choices of chunks: first the role, then what is new, at last the reason of the end."""
        if not self._has_begun:
            self._has_begun = True
            yield self._chunk({"role": "assistant", "content": ""})
        logprobs = chat_logprobs(piece.logprobs, self._num_top)
        for delta in self._deltas(piece):
            yield self._chunk(delta, logprobs)
            logprobs = None
        if piece.finish_reason:
            yield self._chunk({}, logprobs, self._reason(piece.finish_reason))
        elif logprobs:
            yield self._chunk({"content": ""}, logprobs)

    def _deltas(self, piece: Piece) -> Iterator[dict[str, Any]]:
        thoughts, text = self._thinking.take(piece.text) if self._thinking else ("", piece.text)
        if piece.finish_reason and self._thinking:
            more_thoughts, more_text = self._thinking.end()
            thoughts, text = thoughts + more_thoughts, text + more_text
        if thoughts:
            yield {"reasoning_content": thoughts}
        found = self._parser.take(text)
        if piece.finish_reason:
            found += self._parser.end()
        for one in found:
            if isinstance(one, str):
                yield {"content": one}
            elif self._tools.kept(one.index):
                self._has_called = True
                yield {"tool_calls": [self._call(one)]}

    def _call(self, call: Call) -> dict[str, Any]:
        function: dict[str, Any] = {"arguments": call.arguments}
        if not call.name:
            return {"index": call.index, "function": function}
        function["name"] = call.name
        return {
            "index": call.index,
            "id": f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": function,
        }

    def _reason(self, reason: str) -> str:
        is_call = self._has_called and not self._tools.is_named
        return "tool_calls" if is_call and reason == "stop" else _REASONS[reason]

    def _chunk(
        self, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, reason: str | None = None
    ) -> dict[str, Any]:
        return {"index": self._index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


class CompletionChoice:
    """One answer of a completion. prompt_text: stands in front of it, empty without echo."""

    def __init__(self, index: int, prompt_text: str, wants_logprobs: bool):
        self._index = index
        self._echo = prompt_text
        self._offset = 0
        self._wants_logprobs = wants_logprobs

    def take(self, piece: Piece) -> Iterator[dict[str, Any]]:
        text, self._echo = self._echo + piece.text, ""
        logprobs = None
        if self._wants_logprobs:
            logprobs = completion_logprobs(piece.logprobs, self._offset)
            self._offset += sum(map(len, logprobs["tokens"]))
        reason = _REASONS[piece.finish_reason] if piece.finish_reason else None
        if text or reason or logprobs:
            yield {"index": self._index, "text": text, "logprobs": logprobs, "finish_reason": reason}


Choice = ChatChoice | CompletionChoice


class Answer:
    """All answers to one client request. kind: `chat.completion` or `text_completion`.

    make_choice(index) begins an answer; per_prompt: how many each prompt has.
    """

    def __init__(
        self, kind: str, request_id: str, model: str, per_prompt: int, make_choice: Callable[[int], Choice]
    ):
        self._kind = kind
        self._head = {"id": request_id, "created": int(time.time()), "model": model}
        self._per_prompt = per_prompt
        self._make_choice = make_choice
        self._choices: dict[int, Choice] = {}
        self.usage = Usage()

    def take(self, prompt: int, piece: Piece) -> Iterator[dict[str, Any]]:
        """What a piece of an answer to a prompt adds: choices of chunks."""
        self.usage.count(prompt, piece)
        index = prompt * self._per_prompt + piece.index
        if index not in self._choices:
            self._choices[index] = self._make_choice(index)
        return self._choices[index].take(piece)

    def chunk(self, choice: dict[str, Any], options: StreamOptions) -> dict[str, Any]:
        """A chunk of a stream with one choice."""
        usage: dict[str, Any] = {}
        if options.include_usage:
            usage = {"usage": self.usage.shown() if options.continuous_usage_stats else None}
        return {**self._head, "object": self._chunk_kind, "choices": [choice], **usage}

    def usage_chunk(self) -> dict[str, Any]:
        """The last chunk of a stream whose client wants its usage."""
        return {**self._head, "object": self._chunk_kind, "choices": [], "usage": self.usage.shown()}

    @property
    def _chunk_kind(self) -> str:
        return f"{self._kind}.chunk" if self._kind == "chat.completion" else self._kind

    def whole(self, chunks: list[dict[str, Any]]) -> dict[str, Any]:
        """One object with everything that the chunks' choices say."""
        choices: dict[int, dict[str, Any]] = {}
        for chunk in chunks:
            index = chunk["index"]
            if "delta" in chunk:
                _join_chat(choices.setdefault(index, _empty_chat(index)), chunk)
            else:
                _join_completion(choices.setdefault(index, {**chunk, "text": "", "logprobs": None}), chunk)
        ordered = [choices[index] for index in sorted(choices)]
        return {**self._head, "object": self._kind, "choices": ordered, "usage": self.usage.shown()}


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
