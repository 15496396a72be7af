"""Renders chat messages with the model's own template."""

from __future__ import annotations

from typing import Any, Protocol


class ChatTemplateError(ValueError):
    """The messages cannot be rendered; the sentence says why."""


class Chat(Protocol):
    """What is rendered."""

    messages: list[dict[str, Any]] | None
    tools: list[Any] | None
    add_generation_prompt: bool
    chat_template_kwargs: dict[str, Any]


def render_chat(tokenizer: Any, chat: Chat) -> str:
    """The prompt's text. tokenizer: transformers'. Raises ChatTemplateError."""
    import jinja2  # comes with the template's renderer

    if not tokenizer.chat_template:
        raise ChatTemplateError("messages need a chat template, and this model has none; send text_input instead")
    try:
        return tokenizer.apply_chat_template(
            chat.messages,
            tools=chat.tools,
            add_generation_prompt=chat.add_generation_prompt,
            tokenize=False,
            **chat.chat_template_kwargs,
        )
    # A template is a program: a message without a role or content fails in it, as what its expressions raise.
    except (jinja2.TemplateError, TypeError, KeyError, ValueError, AttributeError) as error:
        raise ChatTemplateError(f"messages cannot be rendered by the model's chat template: {error}") from error
