"""Chat messages to prompts: what clients send, as the model's template takes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pagetide.models.source import find_model
from pagetide.text.chat import ChatRenderer, ChatTemplateError
from transformers import AutoTokenizer

CACHE = Path(__file__).parents[2] / ".cache"
PARTS = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
CALL = {"type": "function", "function": {"name": "f", "arguments": '{"x": [1, "é"]}'}}
TEXTS = "{% for m in messages %}{{ m.role }}: {{ m.content }}|{% endfor %}"
LISTS = "{% for m in messages %}{% for p in m.content %}<{{ p.text }}>{% endfor %}{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(str(find_model("", CACHE)))


def render(
    tokenizer: Any, template: str, messages: list[dict[str, Any]], max_bytes: int = 10_000, **variables: Any
) -> str:
    tokenizer.chat_template = template
    return ChatRenderer(tokenizer, max_bytes).render(messages, None, True, variables)


def test_the_models_own_template_gives_what_transformers_gives(tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hé?"}]
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ChatRenderer(tokenizer, 10_000).render(messages, None, True, {}) == expected


def test_parts_are_joined_for_templates_of_texts_and_kept_for_those_of_parts(tokenizer):
    assert render(tokenizer, TEXTS, PARTS) == "user: a\nb|"
    assert render(tokenizer, LISTS, PARTS) == "<a><b>"


def test_arguments_of_tool_calls_are_objects_and_absent_content_is_empty(tokenizer):
    message = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    call = "{{ m.tool_calls[0].function.arguments | tojson }}"
    template = "{% for m in messages %}[{{ m.content }}]" + call + "{% endfor %}"
    assert render(tokenizer, template, [message]) == '[]{"x": [1, "é"]}'
    broken = {**CALL, "function": {"name": "f", "arguments": "{"}}
    with pytest.raises(ChatTemplateError, match="arguments of a tool call are not valid JSON"):
        render(tokenizer, template, [{**message, "tool_calls": [broken]}])


@pytest.mark.parametrize(
    "key",
    [
        "chat_template",
        "tokenize",
        "messages",
        "tools",
        "documents",
        "return_dict",
        "conversation",
        "bos_token",
    ],
)
def test_no_variable_is_a_parameter_of_the_renderer(tokenizer, key):
    tokenizer.chat_template = TEXTS
    with pytest.raises(ChatTemplateError, match=f"chat_template_kwargs has {key}, which no client may set"):
        ChatRenderer(tokenizer, 10_000).render(PARTS, None, True, {key: "x"})
    assert render(tokenizer, "{{ mine }}", PARTS, mine="yes") == "yes"


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
        "{% for m in messages %}{{ m.content * 100000 }}{% endfor %}",
    ],
)
def test_rendering_has_a_limit(tokenizer, template):
    with pytest.raises(ChatTemplateError, match=r"more tokens than the model's context has|longer than"):
        render(tokenizer, template, [{"role": "user", "content": "x"}], max_bytes=50_000)


@pytest.mark.parametrize(
    "messages",
    [[{}], [{"role": "user"}], [{"role": "user", "content": 3}], [{"role": 1, "content": ["a", 2]}]],
)
def test_broken_messages_are_a_clear_error_or_rendered(tokenizer, messages):
    template = "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}"
    with pytest.raises(ChatTemplateError, match=r"cannot be rendered|a message has a part of type"):
        render(tokenizer, template, messages)
