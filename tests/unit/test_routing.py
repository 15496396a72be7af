"""Prompts that begin alike meet at one server, and no server has much more than its share."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st
from pagetide.gateway.routing import in_order, leading


@dataclass
class Server:
    url: str
    num_open: int = 0
    rests_until: float = 0.0


def servers(count: int) -> list[Server]:
    return [Server(f"10.0.0.{number}:8001") for number in range(count)]


def test_a_chat_stays_where_it_began():
    system, question = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}
    later = [system, question, {"role": "assistant", "content": "So."}, {"role": "user", "content": "Go on."}]
    assert leading({"messages": [system, question]}) == leading({"messages": later})
    assert leading({"messages": [system, {**question, "content": "When?"}]}) != leading({"messages": later})
    assert leading({"text_input": "x" * 300}) == leading({"text_input": "x" * 256 + "y"})
    assert leading({"input_ids": list(range(100))}) == leading({"input_ids": list(range(64))})
    assert leading({"text_input": "\ud83d"}) and leading({"text_input": ""}) == b""


def test_one_server_less_moves_only_its_own_prompts():
    all_of_them = servers(5)
    for number in range(200):
        key = str(number).encode()
        first, second, *_ = in_order(all_of_them, key, 1.0)
        left = [server for server in all_of_them if server is not all_of_them[2]]
        assert in_order(left, key, 1.0)[0] is (second if first is all_of_them[2] else first)


def test_different_prompts_are_spread():
    several = servers(4)
    found = Counter(in_order(several, str(number).encode(), 1.0)[0].url for number in range(4000))
    assert min(found.values()) > 800


@given(st.integers(1, 6), st.lists(st.sampled_from([b"a", b"b", b"c"]), min_size=1, max_size=120))
def test_no_server_has_more_than_its_share(count, keys):
    several = servers(count)
    for total, key in enumerate(keys, 1):
        in_order(several, key, 1.0)[0].num_open += 1
        assert max(server.num_open for server in several) <= 1.25 * total / count + 1


def test_a_server_that_rests_comes_last():
    several = servers(3)
    first = in_order(several, b"x", 1.0)[0]
    first.rests_until = 2.0
    assert in_order(several, b"x", 1.0)[-1] is first
    assert in_order(several, b"x", 3.0)[0] is first
