"""Pieces of answers, as they come, to choices of chunks: what is new of text, thoughts and calls."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from pagetide.gateway.calls import Call, Parser, Thinking
from pagetide.gateway.logprobs import Entries, chat_logprobs, completion_logprobs, first_token
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


@dataclass
class Echo:
    """A prompt that stands in front of its answers. entries: its tokens' log-probabilities, as the first
    answer's first piece brings them.
    """

    text: str
    entries: Entries = field(default_factory=list)


class CompletionChoice:
    """One answer of a completion. echo: what stands in front of it."""

    def __init__(self, index: int, echo: Echo | None, wants_logprobs: bool):
        self._index = index
        self._echo = echo
        self._offset = 0
        self._wants_logprobs = wants_logprobs

    def take(self, piece: Piece) -> Iterator[dict[str, Any]]:
        echo, self._echo = self._echo, None
        text = (echo.text if echo else "") + piece.text
        logprobs = None
        if self._wants_logprobs:
            found = piece.logprobs or {}
            entries, first = list(found.get("logprobs", ())), ""
            if echo:
                echo.entries = found.get("prompt_logprobs") or echo.entries
                first = first_token(echo.text, echo.entries)
                entries = [*echo.entries, *entries]
            logprobs = completion_logprobs(entries, self._offset, first)
            self._offset += sum(map(len, logprobs["tokens"]))
        reason = _REASONS[piece.finish_reason] if piece.finish_reason else None
        if text or reason or logprobs:
            yield {"index": self._index, "text": text, "logprobs": logprobs, "finish_reason": reason}


Choice = ChatChoice | CompletionChoice


class Answers:
    """All answers to one client request, as choices of chunks.

    make_choice(index) begins an answer; per_prompt: how many each prompt has. first_leads: the first of them
    tells of the prompt what all need, so that they wait for its first piece.
    """

    def __init__(self, per_prompt: int, make_choice: Callable[[int], Choice], first_leads: bool = False):
        self._per_prompt = per_prompt
        self._make_choice = make_choice
        self._choices: dict[int, Choice] = {}
        self._first_leads = first_leads
        self._waiting: dict[int, list[Piece]] = {}
        self.usage = Usage()

    def take(self, prompt: int, piece: Piece) -> Iterator[dict[str, Any]]:
        """What a piece of an answer to a prompt adds: choices of chunks."""
        self.usage.count(prompt, piece)
        first = prompt * self._per_prompt
        if self._first_leads and piece.index and first not in self._choices:
            self._waiting.setdefault(prompt, []).append(piece)
            return
        for one in (piece, *self._waiting.pop(prompt, ())):
            index = first + one.index
            if index not in self._choices:
                self._choices[index] = self._make_choice(index)
            yield from self._choices[index].take(one)
