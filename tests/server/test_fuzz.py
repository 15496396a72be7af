"""A minute of scripts/fuzz.py: random requests made from the contract's table, each answer checked against
it; and the beginning of scripts/soak.py: each request in every way, compared with the engine's alone.
"""

from __future__ import annotations

import json

import fuzz
import soak
from client import CACHE
from triton_server import TritonServer, free_address


def test_a_minute_of_random_requests_finds_nothing():
    """On a server of its own, so that its stop shows whether a request is still in flight."""
    server = TritonServer(
        free_address(),
        {
            "cache_dir": CACHE,
            "check_integrity": True,
            "num_blocks": 600,
            "max_model_len": 4096,
            "num_speculative_tokens": 4,
        },
    )
    server.start()
    server.wait_until_ready()
    try:
        report = fuzz.run(server, seconds=60, clients=6, seed=1)
    finally:
        stopped = server.stop()
    assert not report.failures, json.dumps(report.failures[:3], default=repr)
    assert stopped and report.outcomes["answered"] > 10 and report.outcomes["refused"] > 10, report.outcomes


def test_every_way_to_ask_brings_what_the_engine_says():
    report = soak.run(seconds=0, num_clients=6, num_requests=40, kill_every=float("inf"), seed=1)
    assert not report.failures, json.dumps(report.failures[:3], default=repr)
    assert all(report.outcomes[way] >= 10 for way in soak.Asker.plain_ways), report.outcomes
