"""The line that the log gets for each request, if asked for."""

from __future__ import annotations

import json
import logging

import pytest
from pagetide.types import Guide, RequestError
from small_engine import SmallEngine


def lines(caplog) -> dict[int, dict]:
    """By request number; each has one."""
    told = [json.loads(one.getMessage()) for one in caplog.records if one.name == "pagetide.requests"]
    assert len({line["number"] for line in told}) == len(told)
    return {line["number"]: line for line in told}


@pytest.fixture
def small(caplog) -> SmallEngine:
    caplog.set_level(logging.INFO)
    return SmallEngine(log_requests=True)


def test_each_end_is_told_once(small, caplog):
    small.clock_ns = 1_000_000_000
    small.add(1, [3, 4, 5, 6, 7], max_tokens=6)
    small.add(2, [3, 4], max_tokens=4, n=3, temperature=1.0, priority=-2)
    small.add(3, [9], max_tokens=50)
    small.add(4, [8], max_tokens=50, deadline_ns=3_000_000_000)
    small.add(5, [8], max_tokens=5, guide=Guide("regex", "x"))
    small.guides.futures["x"].set_exception(RequestError("no such grammar: SECRET"))
    small.clock_ns = 1_500_000_000
    for _ in range(3):
        small.step()
    small.engine.cancel([3])
    small.clock_ns = 4_000_000_000
    small.run()
    told = lines(caplog)
    assert told[1] == {
        "request_id": "r1",
        "number": 1,
        "priority": 0,
        "lora_name": "",
        "prompt_tokens": 5,
        "cached_tokens": 0,
        "answer_tokens": 6,
        "queue_s": 0.5,
        "first_token_s": 0.5,
        "total_s": 3.0,
        "finish_reasons": ["length"],
        "error": None,
    }
    assert told[2]["finish_reasons"] == ["length"] * 3 and told[2]["answer_tokens"] == 12
    assert told[2]["priority"] == -2
    assert told[3]["finish_reasons"] == ["cancelled"] and told[4]["finish_reasons"] == ["timeout"]
    assert told[5]["error"] == "RequestError" and told[5]["finish_reasons"] == []
    assert told[5]["queue_s"] is None and told[5]["first_token_s"] is None
    assert "SECRET" not in caplog.text


def test_nothing_is_told_unless_asked_for(caplog):
    caplog.set_level(logging.INFO)
    small = SmallEngine()
    small.add(1, [3], max_tokens=2)
    small.run()
    assert lines(caplog) == {}
