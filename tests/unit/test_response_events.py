"""Answers in the shape of the Responses API: what the events tell, step by step, is the object at the end."""

from __future__ import annotations

import copy
import json
from itertools import groupby
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pagetide.gateway.answers import Usage
from pagetide.gateway.bodies import ResponsesBody
from pagetide.gateway.errors import ApiError
from pagetide.gateway.inputs import chat_of
from pagetide.gateway.responses import ResponseShape

SCORED = {"token": "a", "logprob": -1.0, "bytes": [97], "top_logprobs": []}


def choice(delta: dict[str, Any], logprobs: int = 0, reason: str | None = None) -> dict[str, Any]:
    told = {"content": [SCORED] * logprobs, "refusal": None} if logprobs else None
    return {"index": 0, "delta": delta, "logprobs": told, "finish_reason": reason}


def call(name: str, arguments: str) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments} if name else {"arguments": arguments}
    return {"tool_calls": [{"index": 0, "id": f"call_{name}", "type": "function", "function": function}]}


texts = st.text("ab", min_size=1, max_size=3)
deltas = st.one_of(
    st.builds(lambda text: [{"content": text}], texts),
    st.builds(lambda text: [{"reasoning_content": text}], texts),
    st.just([{"content": ""}]),  # tokens whose text is held back
    st.builds(
        lambda name, parts: [call(name, ""), *(call("", part) for part in parts)], texts, st.lists(texts)
    ),
)


def told(shape: ResponseShape, choices: list[dict[str, Any]]) -> list[dict[str, Any]]:
    pieces = [*shape.begin()]
    for one in choices:
        pieces += shape.take(one)
    pieces += shape.end()
    found = []
    for piece in pieces:
        head, data, *rest = piece.decode().split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert head == f"event: {found[-1]['type']}" and rest == ["", ""]
    return found


def followed(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The output as a client builds it from what each event adds."""
    output: list[dict[str, Any]] = []
    for event in events:
        kind, at = event["type"].removeprefix("response."), event.get("output_index")
        if at is not None and kind != "output_item.added":
            assert at == len(output) - 1, "one item after the other"
            item = output[at]
            assert item["id"] == event.get("item_id", item["id"])
        if kind == "output_item.added":
            assert at == len(output) and event["item"]["status"] == "in_progress"
            assert not event["item"].get("content") and not event["item"].get("arguments")
            output.append(copy.deepcopy(event["item"]))
        elif kind == "content_part.added":
            assert event["part"]["text"] == ""
            item["content"].append(copy.deepcopy(event["part"]))
        elif kind in ("output_text.delta", "reasoning_text.delta"):
            item["content"][0]["text"] += event["delta"]
            if "logprobs" in event:
                item["content"][0]["logprobs"] += event["logprobs"]
        elif kind == "function_call_arguments.delta":
            item["arguments"] += event["delta"]
        elif kind in ("output_text.done", "reasoning_text.done"):
            assert event["text"] == item["content"][0]["text"]
            assert event.get("logprobs") == item["content"][0].get("logprobs")
        elif kind == "function_call_arguments.done":
            assert (event["name"], event["arguments"]) == (item["name"], item["arguments"])
        elif kind == "content_part.done":
            assert event["part"] == item["content"][0]
        elif kind == "output_item.done":
            item["status"] = event["item"]["status"]
            assert item == event["item"]
    return output


def shape_of(usage: Usage | None = None) -> ResponseShape:
    return ResponseShape(ResponsesBody(input="x"), "resp_1", "ensemble", usage or Usage())


def kind_of(delta: dict[str, Any]) -> str:
    """The item that a delta belongs to; empty: it opens none."""
    if "reasoning_content" in delta or delta.get("content"):
        return "message" if "content" in delta else "reasoning"
    return "function_call" if "tool_calls" in delta and "name" in delta["tool_calls"][0]["function"] else ""


HELD = {"content": ""}
THOUGHTS = [[{"reasoning_content": "a"}], [HELD], [{"reasoning_content": "b"}], [{"content": "a"}]]


@given(st.lists(deltas, max_size=5), st.sampled_from(["stop", "length", "tool_calls"]), st.integers(0, 2))
@example([], "length", 0)
@example(THOUGHTS, "stop", 1)
@example([[HELD], [call("f", ""), call("", "{"), call("", "}")], [HELD]], "length", 1)
def test_what_events_tell_is_the_object(groups, reason, num_scored):
    """Log-probabilities stand beside everything: only those of a message's text are shown, and none opens an
    item.
    """
    flat = [one for group in groups for one in group]
    choices = [choice({"role": "assistant", "content": ""})]
    choices += [choice(delta, num_scored) for delta in flat]
    choices.append(choice({}, num_scored, reason))
    events = told(shape_of(), choices)
    status = "incomplete" if reason == "length" else "completed"
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[-1]["type"] == f"response.{status}" and events[-1]["response"]["status"] == status
    assert followed(events) == events[-1]["response"]["output"]

    whole = shape_of().whole(choices)
    for item in (*whole["output"], *events[-1]["response"]["output"]):
        del item["id"]
    assert whole == {**events[-1]["response"], "created_at": whole["created_at"]}
    output = whole["output"]
    assert {item["status"] for item in output[:-1]} <= {"completed"} and output[-1]["status"] == status
    kinds = [kind for delta in flat if (kind := kind_of(delta))]
    grouped = [kind for kind, of in groupby(kinds) for _ in (of if kind == "function_call" else "1")]
    assert [item["type"] for item in output] == (grouped or ["message"])
    scored = sum(len(item["content"][0]["logprobs"]) for item in output if item["type"] == "message")
    assert num_scored * sum(bool(delta.get("content")) for delta in flat) <= scored <= num_scored * len(flat)
    for kind, name in (("message", "content"), ("reasoning", "reasoning_content")):
        shown = "".join(item["content"][0]["text"] for item in output if item["type"] == kind)
        assert shown == "".join(delta.get(name, "") for delta in flat)
    names = [part["tool_calls"][0]["function"].get("name") for part in flat if "tool_calls" in part]
    assert [item["name"] for item in output if item["type"] == "function_call"] == [n for n in names if n]


def test_an_answer_that_fails_says_so_in_its_last_event():
    shape = shape_of()
    before = [*shape.begin(), *shape.take(choice({"content": "a"}))]
    (last,) = [json.loads(piece.split(b"data: ")[1]) for piece in shape.fail(ApiError(503, "it is gone"))]
    assert last["type"] == "response.failed" and last["sequence_number"] == len(before)
    assert last["response"]["error"] == {"code": "server_error", "message": "it is gone"}
    assert last["response"]["status"] == "failed" and last["response"]["usage"] is None


def test_items_are_the_messages_of_a_chat():
    items = [
        {"role": "developer", "content": "Be kind."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
        {"type": "function_call", "call_id": "2", "name": "g", "arguments": "{}"},
        {"role": "assistant", "content": "Wait."},
        {"type": "function_call_output", "call_id": "2", "output": "rain"},
        {"role": "assistant", "content": [{"type": "output_text", "text": "It", "annotations": []}]},
        {"type": "function_call", "call_id": "3", "name": "f", "arguments": "{}"},
    ]
    chat = chat_of(ResponsesBody(input=items, instructions="Be brief."))
    system, user, calling, told, last = chat.messages
    assert system == {"role": "system", "content": "Be brief.\n\nBe kind."} and user["content"] == "Weather?"
    assert [call["function"]["name"] for call in calling["tool_calls"]] == ["f", "g"]
    assert calling["content"] == "Wait." and told["role"] == "tool"
    assert told == {"role": "tool", "tool_call_id": "2", "content": "rain", "name": "g"}
    assert last["content"] == "It" and last["tool_calls"][0]["id"] == "3"
    unnamed = {"format": {"type": "json_schema", "schema": {"type": "object"}}}
    assert chat_of(ResponsesBody(input="Hi", text=unnamed)).response_format is not None
    assert chat_of(ResponsesBody(input="Hi")).messages == [{"role": "user", "content": "Hi"}]


def test_fields_are_those_of_a_chat():
    asked = {
        "max_output_tokens": 7,
        "include": ["message.output_text.logprobs"],
        "top_logprobs": 2,
        "text": {
            "format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}},
            "verbosity": "low",
        },
        "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": True}],
        "tool_choice": {"type": "function", "name": "f"},
        "reasoning": {"effort": "low"},
        "truncation": "disabled",
        "background": False,
        "store": True,
        "n": 1,
        "logprobs": False,
        "top_k": 5,
        "seed": 3,
    }
    chat = chat_of(ResponsesBody(input="x", **asked))
    assert (chat.max_completion_tokens, chat.logprobs, chat.top_logprobs, chat.seed) == (7, True, 2, 3)
    assert chat.response_format.json_schema.json_schema == {"type": "object"}
    assert chat.tools[0].function.name == chat.tool_choice.function.name == "f"
    assert chat.model_extra == {"store": True, "top_k": 5}


@pytest.mark.parametrize(
    "given, param",
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"n": 2}, "n"),
        ({"max_tokens": 2}, "max_tokens"),
        ({"input": [{"type": "web_search_call"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input"),
        ({"input": [{"role": "king", "content": "x"}]}, "input"),
        ({"input": [{"role": "user"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": [], "text": "x"}]}]}, "input"),
        ({"input": [{"type": "function_call", "name": 1}]}, "input"),
        ({"input": [{"type": "reasoning"}]}, "input"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(given, param):
    with pytest.raises(ApiError) as refusal:
        chat_of(ResponsesBody(**{"input": "x", **given}))
    assert (refusal.value.status, refusal.value.param) == (400, param)
