"""Renders chat messages with the model's own template."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class ChatTemplateError(ValueError):
    """The messages cannot be rendered; the sentence says why."""


def read_template(setting: str) -> str | None:
    """The template that the setting chat_template names: the text itself, or a file's; None if it is empty. Raises OSError."""
    if not setting or "{" in setting:
        return setting or None
    return Path(setting).expanduser().read_text(encoding="utf-8")


def render_chat(
    tokenizer: Any,
    messages: list[dict[str, Any]],
    tools: list[Any] | None,
    add_generation_prompt: bool,
    variables: dict[str, Any],
) -> str:
    """The prompt's text. tokenizer: transformers'; variables: what else the template may use. Raises ChatTemplateError."""
    import jinja2  # comes with the template's renderer

    if not tokenizer.chat_template:
        raise ChatTemplateError("messages need a chat template, and this model has none; send text_input, or set chat_template on the server")
    try:
        return tokenizer.apply_chat_template(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
            **variables,
        )
    # A template is a program: a message without a role or content fails in it, as what its expressions raise.
    except (jinja2.TemplateError, TypeError, KeyError, ValueError, AttributeError) as error:
        raise ChatTemplateError(f"messages cannot be rendered by the model's chat template: {error}") from error
