"""Renders chat messages with the model's own template."""

from __future__ import annotations

import inspect
import json
import time
from pathlib import Path
from typing import Any

MAX_RENDER_S = 5.0
_PROBE = "probe of a part"
_MARK = "\ue000end of the content\ue001"


class ChatTemplateError(ValueError):
    """The messages cannot be rendered; the sentence says why."""


def read_template(setting: str) -> str | None:
    """The template that the setting chat_template names: the text itself, or a file's; None if it is empty.

    Raises OSError.
    """
    if not setting or "{" in setting:
        return setting or None
    return Path(setting).expanduser().read_text(encoding="utf-8")


class ChatRenderer:
    """A tokenizer's chat template.

    tokenizer: transformers'; max_bytes: longer prompts do not fit into the model's context.
    """

    def __init__(self, tokenizer: Any, max_bytes: int):
        self._tokenizer = tokenizer
        self._max_bytes = max_bytes
        # A key of chat_template_kwargs is data for the template: it may not be one of the renderer's own
        # parameters.
        self._reserved = set(inspect.signature(tokenizer.apply_chat_template).parameters) | {
            "messages",
            *tokenizer.special_tokens_map,
        }
        self._takes_parts = self._template_takes_parts()

    def _template_takes_parts(self) -> bool:
        """True if the template writes the texts of content that is a list of parts; most know only content
        that is a text.
        """
        if not self._tokenizer.chat_template:
            return False
        message = {"role": "user", "content": [{"type": "text", "text": _PROBE}]}
        try:
            rendered = self._render([message], None, True, {})
        except ChatTemplateError:
            return False
        return _PROBE in rendered and "'type'" not in rendered and '"type"' not in rendered

    def continued(
        self, messages: list[dict[str, Any]], tools: list[Any] | None, variables: dict[str, Any]
    ) -> str:
        """The prompt's text up to the end of the last message's content, for an answer that goes on with it.

        Raises ChatTemplateError.
        """
        last = _plain(messages[-1], takes_parts=False)
        if not isinstance(last.get("content"), str):
            raise ChatTemplateError("continue_final_message needs a last message whose content is a text")
        # What the template writes behind the content, and what it strips off its end, is told by a mark.
        marked = [*messages[:-1], {**last, "content": last["content"] + _MARK}]
        text, mark, _end = self.render(marked, tools, False, variables).rpartition(_MARK)
        if not mark:
            raise ChatTemplateError("the model's chat template does not write the last message's content")
        return text

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[Any] | None,
        add_generation_prompt: bool,
        variables: dict[str, Any],
    ) -> str:
        """The prompt's text. variables: what else the template may use. Raises ChatTemplateError."""
        if not self._tokenizer.chat_template:
            raise ChatTemplateError(
                "messages need a chat template, and this model has none; send text_input, or set "
                "chat_template on the server"
            )
        if wrong := sorted(self._reserved & variables.keys()):
            raise ChatTemplateError(
                f"chat_template_kwargs has {', '.join(wrong)}, which no client may set; it may "
                "have other variables of the template"
            )
        return self._render(
            [_plain(message, self._takes_parts) for message in messages],
            tools,
            add_generation_prompt,
            variables,
        )

    def _render(
        self,
        messages: list[dict[str, Any]],
        tools: list[Any] | None,
        add_generation_prompt: bool,
        variables: dict[str, Any],
    ) -> str:
        import jinja2  # comes with the template's renderer
        from transformers.utils.chat_template_utils import _compile_jinja_template

        known = {
            "messages": messages,
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
            **self._tokenizer.special_tokens_map,
        }
        try:
            template = _compile_jinja_template(self._tokenizer.get_chat_template(tools=tools))
            return self._within_limits(template.generate(**{**variables, **known}))
        # A template is a program: a message without a role or content fails in it, as what its expressions
        # raise.
        except (
            jinja2.TemplateError,
            TypeError,
            LookupError,
            ValueError,
            AttributeError,
            ArithmeticError,
            RecursionError,
        ) as error:
            raise ChatTemplateError(
                f"messages cannot be rendered by the model's chat template: {error}"
            ) from error

    def _within_limits(self, pieces: Any) -> str:
        begin, size, text = time.monotonic(), 0, []
        for piece in pieces:
            text.append(piece)
            size += len(piece)
            if size > self._max_bytes:
                raise ChatTemplateError(
                    f"the rendered messages have more than {self._max_bytes} characters, more "
                    "tokens than the model's context has"
                )
            if time.monotonic() - begin > MAX_RENDER_S:
                raise ChatTemplateError(
                    f"the messages take longer than {MAX_RENDER_S:g} s to render; send fewer or simpler ones"
                )
        return "".join(text)


def _plain(message: dict[str, Any], takes_parts: bool) -> dict[str, Any]:
    """The message as templates know it: content as a text where they cannot take parts, arguments of tool
    calls as objects, as in vLLM.
    """
    message = dict(message)
    if calls := message.get("tool_calls"):
        if not isinstance(calls, list):
            raise ChatTemplateError(f"tool_calls is {str(calls)[:80]!r}, must be a list of calls")
        message["tool_calls"] = [_with_parsed_arguments(call) for call in calls]
    if message.get("content") is None and message.get("tool_calls"):
        message["content"] = ""
    if isinstance(message.get("content"), list):
        parts = message["content"]
        texts = [_text_of(part) for part in parts]
        message["content"] = (
            [{"type": "text", "text": text} for text in texts] if takes_parts else "\n".join(texts)
        )
    return message


def _text_of(part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, dict) else part
    raise ChatTemplateError(
        f"a message has a part of type {str(kind)[:80]!r}, this model takes parts of type 'text' only"
    )


def _with_parsed_arguments(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError) as error:
        raise ChatTemplateError(f"the arguments of a tool call are not valid JSON ({error})") from None
    return {**call, "function": {**function, "arguments": arguments}}
