"""When a sequence ends, and which tokens may be shown before that."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pagetide.engine.stops import StopChecker, StopRules, StopText, num_incomplete_bytes
from pagetide.text.tokens import decode


def run(
    tokens: list[bytes],
    stops: tuple[str, ...] = (),
    end: int | None = None,
    min_tokens: int = 0,
    includes_stop: bool = False,
    shown: list[bytes] | None = None,
) -> tuple[list[str], str, list[int]]:
    """The texts of the chunks, the reason, and all shown ids."""
    end_ids = frozenset() if end is None else frozenset([end])
    found = tuple(StopText(s.encode()) for s in stops)
    checker = StopChecker(StopRules(shown or tokens, tokens, end_ids, found, includes_stop, min_tokens))
    texts, ids, table = [], [], shown or tokens
    for token in range(len(tokens)):
        reason = checker.push(token)
        ids_now = checker.take(is_last=bool(reason))
        ids += ids_now
        texts.append(decode(table, ids_now, checker.num_cut if reason else 0))
        if reason:
            return texts, reason, ids
    ids_now = checker.take(is_last=True)
    return [*texts, decode(table, ids_now)], "", ids + ids_now


def test_a_character_spread_over_tokens_is_held_back_until_it_is_whole():
    emoji = "🌊".encode()
    texts, _, _ = run([b"a", emoji[:1], emoji[1:3], emoji[3:], b"b"])
    assert texts == ["a", "", "", "🌊", "b", ""]


def test_bytes_that_are_no_character_are_replaced_and_do_not_block():
    texts, _, _ = run([b"a", b"\xff", b"\xf0\x9f", b"b"])
    assert "".join(texts) == b"a\xff\xf0\x9fb".decode("utf-8", "replace")


@given(
    st.lists(st.sampled_from([b"\xf0", b"\xf0\x9f", b"\x9f", b"\xe2\x82", b"\xed\xa0", b"a", b"\x8c\x8a"]))
)
def test_what_never_becomes_a_character_is_shown_as_it_comes(tokens):
    """A model that repeats the beginning of one forever is not silent."""
    checker, shown, longest = StopChecker(StopRules(tokens, tokens)), [], 2
    for token in range(len(tokens)):
        checker.push(token)
        shown.append(decode(tokens, checker.take(is_last=False)))
        assert len(checker._held) < 3 + longest
    shown.append(decode(tokens, checker.take(is_last=True)))
    assert "".join(shown) == b"".join(tokens).decode(errors="replace")


@pytest.mark.parametrize(
    "stop, expected", [("ST", "ab"), ("bS", "a"), ("TOP", "abS"), ("abSTOPc", ""), ("x", None)]
)
def test_stop_text_across_token_borders_is_cut_off(stop, expected):
    texts, reason, _ = run([b"a", b"bS", b"TO", b"Pc", b"d"], (stop,))
    assert ("".join(texts), reason) == (("abSTOPcd", "") if expected is None else (expected, "stop"))


def test_the_beginning_of_a_stop_text_is_not_shown_before_it_is_decided():
    texts, _, _ = run([b"a", b"S", b"T", b"x", b"y"], ("STOP",))
    assert texts == ["a", "", "", "STx", "y", ""]


def test_the_earliest_of_several_stop_texts_counts():
    texts, reason, _ = run([b"one two three"], ("three", "two"))
    assert ("".join(texts), reason) == ("one ", "stop")


def test_stop_text_inside_a_character_of_several_bytes():
    wave = "🌊".encode()
    texts, reason, _ = run([b"a", wave[:2], wave[2:], b"b"], ("🌊",))
    assert ("".join(texts), reason) == ("a", "stop")


def test_stops_do_not_count_before_min_tokens():
    texts, reason, ids = run([b"a", b"b", b"c", b"a"], ("a",), min_tokens=2)
    assert ("".join(texts), reason, ids) == ("abc", "stop", [0, 1, 2, 3])
    assert run([b"a", b"b", b"c"], end=0, min_tokens=2)[1] == ""


def test_a_stop_text_before_min_tokens_is_not_found_afterwards_either():
    """Whether chunks have been shown meanwhile or not."""
    tokens = [b"a.", b"b", b"c", b"d."]
    rules = StopRules(tokens, tokens, stops=(StopText(b"."),), min_tokens=3)
    for streams in (True, False):
        checker, ids = StopChecker(rules), []
        for token in range(4):
            reason = checker.push(token)
            ids += checker.take(bool(reason)) if streams or reason else []
        assert (reason, decode(tokens, ids, checker.num_cut)) == ("stop", "a.bcd")


@pytest.mark.parametrize(
    "stop, expected", [("<sep>", "ab"), ("b<sep>c", "a"), ("<sep>c", "ab"), ("sep", "ab")]
)
def test_a_stop_text_may_be_or_hold_a_special_token_that_does_not_show(stop, expected):
    texts, reason, _ = run([b"a", b"b", b"<sep>", b"cd"], (stop,), shown=[b"a", b"b", b"", b"cd"])
    assert ("".join(texts), reason) == (expected, "stop")


def test_the_text_of_an_end_token_is_not_shown():
    texts, reason, ids = run([b"a", b"END", b"b"], end=1)
    assert ("".join(texts), reason, ids) == ("a", "stop", [0, 1])


def test_what_ends_the_answer_stays_if_asked_for_but_nothing_behind_it():
    assert "".join(run([b"a", b"bST", b"OPc"], ("STOP",), includes_stop=True)[0]) == "abSTOP"
    assert "".join(run([b"a", b"END", b"b"], end=1, includes_stop=True)[0]) == "aEND"


@given(st.text(max_size=6), st.integers(0, 24))
def test_incomplete_bytes_are_those_after_the_last_whole_character(text, cut):
    cut = min(cut, len(text.encode()))
    borders = [len(text[:i].encode()) for i in range(len(text) + 1)]
    assert num_incomplete_bytes(text.encode()[:cut]) == cut - max(
        border for border in borders if border <= cut
    )


@settings(max_examples=300)
@given(
    st.text(alphabet="ab🌊é漢", max_size=30),
    st.lists(st.text(alphabet="ab🌊é", min_size=1, max_size=4), max_size=3),
    st.integers(0, 2**32),
)
def test_chunks_joined_are_the_text_before_the_first_stop(text, stops, seed):
    data, chooser, tokens = text.encode(), random.Random(seed), []
    while data:
        size = chooser.randint(1, 5)
        tokens.append(data[:size])
        data = data[size:]
    texts, reason, _ = run(tokens, tuple(stops))
    # A stop is found with the token that completes it; of those found then, the earliest counts.
    expected, whole = text, b""
    for token in tokens:
        whole += token
        found = [at for stop in stops if (at := whole.find(stop.encode())) >= 0]
        if found:
            expected = whole[: min(found)].decode("utf-8", "replace")
            break
    assert "".join(texts) == expected
    assert reason == (
        "stop" if expected != text or any(text.endswith(s) and whole == text.encode() for s in stops) else ""
    )
