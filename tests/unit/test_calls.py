"""Tool calls and thoughts are found in a model's text however it is cut into pieces."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pagetide.gateway.calls import Call, ListedCalls, MarkedCalls, NamedCall, Parser, Thinking

A = '{"name": "a", "arguments": {"x": "}</tool"}}'
B = '{"name": "b", "arguments": {}}'
CALLS = [("a", {"x": "}</tool"}), ("b", {})]


def pieces(text: str, cuts: list[int]) -> list[str]:
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[a:b] for a, b in pairwise(places)]


def parsed(parser: Parser, parts: list[str]) -> tuple[str, list[tuple[str, dict]]]:
    """All text, and the calls by their numbers."""
    found = [one for part in parts for one in parser.take(part)] + parser.end()
    names: dict[int, str] = {}
    arguments: dict[int, str] = {}
    for call in (one for one in found if isinstance(one, Call)):
        names[call.index] = names.get(call.index, "") + call.name
        arguments[call.index] = arguments.get(call.index, "") + call.arguments
    text = "".join(one for one in found if isinstance(one, str))
    return text, [(names[i], json.loads(arguments[i])) for i in sorted(names)]


TEXTS = [
    ("hermes", f"So: <tool_call>\n{A}\n</tool_call>\n<tool_call>{B}</tool_call>", "So: ", CALLS),
    ("hermes", f"<tool_call>{B}", "", CALLS[1:]),
    ("hermes", "<tool_call>no JSON</tool_call> <tool", "<tool_call>no JSON</tool_call> <tool", []),
    ("hermes", '<tool_call>{"name": 1}', '<tool_call>{"name": 1}', []),
    ("llama3", f"<|python_tag|>{A}; {B}", "", CALLS),
    ("llama3", A.replace("arguments", "parameters"), "", CALLS[:1]),
    ("llama3", "{just text", "{just text", []),
    ("llama3", "plain text", "plain text", []),
    ("mistral", f"[TOOL_CALLS][{A}, {B}]", "", CALLS),
    ("mistral", f"Well. [TOOL_CALLS][{B}]", "Well. ", CALLS[1:]),
    ("mistral", "a [list] of [TOOL", "a [list] of [TOOL", []),
]


@pytest.mark.parametrize("name, text, shown, calls", TEXTS)
@given(cuts=st.lists(st.integers(0, 200), max_size=12))
def test_marked_calls_in_any_pieces(name, text, shown, calls, cuts):
    assert parsed(MarkedCalls(name), pieces(text, cuts)) == (shown, calls)


@given(cuts=st.lists(st.integers(0, 200), max_size=12))
def test_calls_that_were_asked_for_in_any_pieces(cuts):
    assert parsed(ListedCalls(), pieces(f"[ {A} ,\n{B}]", cuts)) == ("", CALLS)
    assert parsed(NamedCall("a"), pieces('{"x": 1}', cuts)) == ("", [("a", {"x": 1})])
    cut = '{"name": "b", "argum'
    assert parsed(ListedCalls(), pieces(f"[{A}, {cut}", cuts)) == (cut, CALLS[:1])


@pytest.mark.parametrize(
    "begins, text, thoughts, answer",
    [
        (False, "<think>\nhm</think>\n\nYes", "\nhm", "Yes"),
        (True, "hm</think>Yes", "hm", "Yes"),
        (False, "Yes <think>", "", "Yes <think>"),
        (False, "<think>never done", "never done", ""),
        (False, "<thi", "", "<thi"),
    ],
)
@given(cuts=st.lists(st.integers(0, 40), max_size=8))
def test_thoughts_are_split_off_in_any_pieces(begins, text, thoughts, answer, cuts):
    thinking = Thinking(begins)
    found = [thinking.take(part) for part in pieces(text, cuts)] + [thinking.end()]
    assert ("".join(a for a, _ in found), "".join(b for _, b in found)) == (thoughts, answer)


@pytest.mark.parametrize("format_name", ["hermes", "llama3", "mistral"])
def test_half_a_surrogate_pair_in_a_call_can_be_sent(format_name):
    """JSON may name what no text can have."""
    text = {
        "hermes": '<tool_call>{"name": "f", "arguments": {"x": "\\ud83d"}}</tool_call>',
        "llama3": '{"name": "f", "parameters": {"x": "\\ud83d"}}',
        "mistral": '[TOOL_CALLS][{"name": "f", "arguments": {"x": "\\ud83d"}}]',
    }[format_name]
    parser = MarkedCalls(format_name)
    (call,) = [*parser.take(text), *parser.end()]
    assert json.loads(call.arguments.encode()) == {"x": "?"}
