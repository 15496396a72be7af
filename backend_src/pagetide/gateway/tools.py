"""What a request's tools ask of the model: the guide that makes calls parse, and the parser of the answer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pagetide.gateway.bodies import ChatBody, NamedTool, Tool
from pagetide.gateway.calls import ListedCalls, MarkedCalls, NamedCall, Parser, PlainText
from pagetide.gateway.errors import refused
from pagetide.gateway.fields import schema_guide, shown_tools


class ToolUse:
    """The tools of one request. is_named: the client has chosen the function.

    format_name: how this model writes calls by itself, one of calls.FORMATS.
    """

    def __init__(self, body: ChatBody, format_name: str):
        self._tools = body.tools or []
        self._format = format_name
        choice = body.tool_choice or ("auto" if self._tools else "none")
        self._named = choice.function.name if isinstance(choice, NamedTool) else ""
        self._choice = "named" if self._named else choice
        self._is_parallel = body.parallel_tool_calls is not False
        if choice != "none" and not self._tools and body.tool_choice is not None:
            raise refused("tool_choice needs tools", "tool_choice")
        if self._named and self._named not in [tool.function.name for tool in self._tools]:
            raise refused(f"tool_choice names {self._named!r}, which is not among tools", "tool_choice")

    @property
    def is_active(self) -> bool:
        """True if the answer may be a call."""
        return bool(self._tools) and self._choice != "none"

    @property
    def is_named(self) -> bool:
        return self._choice == "named"

    @property
    def must_be_called(self) -> bool:
        return self.is_active and self._choice in ("named", "required")

    def shown(self) -> list[dict[str, Any]] | None:
        """The tools for the chat template."""
        return shown_tools(self._tools) if self.is_active else None

    def fields(self) -> dict[str, Any]:
        """The contract's fields: a call that was asked for always parses."""
        if not self.is_active:
            return {}
        if self._choice == "named":
            tool = next(tool for tool in self._tools if tool.function.name == self._named)
            return schema_guide(tool.function.parameters or {"type": "object"})
        if self._choice == "required":
            return schema_guide(_schema_of_calls(self._tools, self._is_parallel))
        # The markers of these formats are special tokens.
        return {} if self._format == "hermes" else {"skip_special_tokens": False}

    def parser(self) -> Parser:
        """A new one for each answer."""
        if not self.is_active:
            return PlainText()
        if self._choice == "named":
            return NamedCall(self._named)
        return ListedCalls() if self._choice == "required" else MarkedCalls(self._format)

    def kept(self, index: int) -> bool:
        """False for further calls where the client takes only one at a time."""
        return index == 0 or self._is_parallel


def _schema_of_calls(tools: Iterable[Tool], is_parallel: bool) -> dict[str, Any]:
    definitions: dict[str, Any] = {}
    calls = [_schema_of_call(tool, definitions) for tool in tools]
    limit = {} if is_parallel else {"maxItems": 1}
    schema = {"type": "array", "minItems": 1, "items": {"anyOf": calls}, **limit}
    return schema | definitions


def _schema_of_call(tool: Tool, definitions: dict[str, Any]) -> dict[str, Any]:
    """A call's schema; what its parameters refer to as #/$defs moves to the root of the whole schema."""
    parameters = dict(tool.function.parameters or {"type": "object"})
    for key in ("$defs", "definitions"):
        own = parameters.pop(key, {})
        if not isinstance(own, dict):
            raise refused(f"{key} of the parameters of {tool.function.name!r} must be an object", "tools")
        for name, schema in own.items():
            if definitions.setdefault(key, {}).setdefault(name, schema) != schema:
                raise refused(
                    f"two tools define {name!r} differently; give one of them another name", "tools"
                )
    return {
        "type": "object",
        "properties": {"name": {"enum": [tool.function.name]}, "arguments": parameters},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }
