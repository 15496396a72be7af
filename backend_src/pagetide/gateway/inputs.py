"""Requests of the Responses API as chats: items to messages, and the names of its fields to a chat's.

https://platform.openai.com/docs/api-reference/responses/create
"""

from __future__ import annotations

from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from pagetide.gateway.bodies import ChatBody, ChosenFunction, FunctionTool, ResponsesBody
from pagetide.gateway.errors import refused

LOGPROBS = "message.output_text.logprobs"  # of `include`
# Names that change nothing in an answer here, beside those of chats.
_IGNORED = {"reasoning", "max_tool_calls", "stream_options", "prompt_cache_options", "background_options"}
# Names that are not for this API: the values that ask for nothing, and what to do instead.
_UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "previous_response_id": ((), "no response is kept; send the items of earlier turns in input"),
    "conversation": ((), "no response is kept; send the items of earlier turns in input"),
    "background": ((False,), "no response is kept; leave it out"),
    "prompt": ((), "no prompt is kept; send it in input"),
    "truncation": (("disabled",), "a prompt that is too long is refused; leave it out"),
    "context_management": (([],), "leave it out"),
    "moderation": ((), "leave it out"),
    "messages": ((), "use input"),
    "max_tokens": ((), "use max_output_tokens"),
    "max_completion_tokens": ((), "use max_output_tokens"),
    "response_format": ((), "use text.format"),
    "logprobs": ((False,), f"use include, with {LOGPROBS!r}"),
    "n": ((1,), "send several requests"),
    "best_of": ((1,), "send several requests"),
    "continue_final_message": ((False,), "end input with what is to be answered"),
}
# What a chat's fields are called here.
OF_RESPONSES = {"messages": "input", "response_format": "text", "max_tokens": "max_output_tokens"}
_ROLES = ("user", "assistant", "system", "developer")
# By the type of a part: what its text is called.
_PARTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}


def chat_of(body: ResponsesBody) -> ChatBody:
    """The chat that is asked for. Raises ApiError for what is refused by name, RequestValidationError for
    values that a chat does not have.
    """
    given = {name: value for name, value in (body.model_extra or {}).items() if value is not None}
    for name, value in given.items():
        harmless, instead = _UNSUPPORTED.get(name, ((value,), ""))
        if value not in harmless:
            raise refused(f"{name} is not supported by /v1/responses: {instead}", name)
    fields = {name: given[name] for name in given if name not in _IGNORED and name not in _UNSUPPORTED}
    wants_logprobs = LOGPROBS in (body.include or ()) or bool(body.top_logprobs)
    fields |= {
        "model": body.model,
        "messages": _messages(body),
        "max_completion_tokens": body.max_output_tokens,
        "stream": body.stream,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "logprobs": wants_logprobs,
        "top_logprobs": body.top_logprobs,
        "tools": [_tool(tool) for tool in body.tools] if body.tools else None,
        "tool_choice": _tool_choice(body),
        "parallel_tool_calls": body.parallel_tool_calls,
        "response_format": _format(body),
    }
    try:
        return ChatBody(**fields)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from None


def _tool(tool: FunctionTool) -> dict[str, Any]:
    return {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}


def _tool_choice(body: ResponsesBody) -> Any:
    choice = body.tool_choice
    if isinstance(choice, ChosenFunction):
        return {"type": "function", "function": {"name": choice.name}}
    return choice if body.tools or choice != "auto" else None  # some clients say it without tools too


def _format(body: ResponsesBody) -> dict[str, Any] | None:
    wanted = body.text.format if body.text else None
    if wanted is None:
        return None
    if wanted.type != "json_schema":
        return {"type": wanted.type}
    if wanted.json_schema is None:
        raise refused("text.format of type json_schema needs schema", "text")
    return {"type": wanted.type, "json_schema": {"name": wanted.name or "", "schema": wanted.json_schema}}


def _messages(body: ResponsesBody) -> list[dict[str, Any]]:
    """As chat templates know them: what the system says at the beginning is one message, and so are calls of
    the assistant that follow each other, with what it says between them.
    """
    messages: list[dict[str, Any]] = []
    if body.instructions is not None:
        messages.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}]
    names: dict[str, str] = {}  # of the functions that were called
    for item in body.input:
        kind = item.get("type") or "message"
        if kind == "message":
            _add_message(messages, item)
        elif kind == "function_call":
            call = _call(item)
            names[call["id"]] = call["function"]["name"]
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": ""})
            messages[-1].setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            told = _string(item, "call_id")
            content = _text(item.get("output"), "output")
            messages.append({"role": "tool", "tool_call_id": told, "content": content})
            if told in names:
                messages[-1]["name"] = names[told]
        elif kind != "reasoning":  # what was thought of earlier answers is no part of a prompt
            raise refused(f"input has an item of type {str(kind)[:80]!r}; {_KNOWN_ITEMS} are known", "input")
    if not messages or all(message["role"] == "system" for message in messages):
        raise refused("input has no message to answer", "input")
    return messages


_KNOWN_ITEMS = "message, function_call, function_call_output and reasoning"


def _add_message(messages: list[dict[str, Any]], item: dict[str, Any]) -> None:
    role = _string(item, "role")
    if role not in _ROLES:
        raise refused(f"input has a message of role {role[:80]!r}; {', '.join(_ROLES)} are known", "input")
    role = "system" if role == "developer" else role
    content = _text(item.get("content"), "content")
    last = messages[-1] if messages else {}
    if role == "system" and [message["role"] for message in messages] == ["system"]:
        last["content"] += "\n\n" + content
    elif role == "assistant" and last.get("tool_calls"):
        last["content"] += content
    else:
        messages.append({"role": role, "content": content})


def _call(item: dict[str, Any]) -> dict[str, Any]:
    function = {"name": _string(item, "name"), "arguments": _string(item, "arguments")}
    return {"id": _string(item, "call_id"), "type": "function", "function": function}


def _string(item: dict[str, Any], name: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise refused(f"input has an item whose {name} is {str(value)[:80]!r}, must be a string", "input")
    return value


def _text(content: Any, name: str) -> str:
    """What content says, a text or parts of it."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise refused(
            f"input has an item whose {name} is {str(content)[:80]!r}, must be a text or parts", "input"
        )
    return "\n".join(map(_text_of_part, content))


def _text_of_part(part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    text = part.get(_PARTS[kind]) if isinstance(kind, str) and kind in _PARTS else None
    if not isinstance(text, str):
        raise refused(
            f"input has a part of type {str(kind)[:80]!r}, this model takes texts only ({', '.join(_PARTS)})",
            "input",
        )
    return text
