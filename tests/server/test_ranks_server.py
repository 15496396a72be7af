"""The embedded model on two ranks behind the real server: its answers, and what clients see when a rank dies
or hangs under load.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator

import psutil
import pytest
from client import CACHE, Streams, generate, metric, start, stream_one, wait_for, wait_until_idle
from pagetide.llm import LLM
from pagetide.types import SamplingParams
from triton_server import TritonServer

SETTINGS = {"dtype": "float32", "cache_dir": CACHE, "num_blocks": 600}
PROMPTS = ["The capital of France is", "Once upon a time", "Water boils at", "The tide rises because"]


@pytest.fixture(scope="module")
def server() -> Iterator[TritonServer]:
    server = start({**SETTINGS, "tensor_parallel_size": 2, "step_timeout_s": 5})
    yield server
    wait_until_idle(server)
    processes = server.processes()
    assert server.stop()
    assert not [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def test_answers_are_those_of_one_rank(server):
    llm = LLM("", **SETTINGS)
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    alone = [answer.outputs[0].token_ids for answer in llm.generate(PROMPTS, params)]
    llm.close()
    streams = Streams(server)
    sent = [
        streams.send("ensemble", f"r{i}", text_input=p, max_tokens=24, temperature=0.0, ignore_eos=True)
        for i, p in enumerate(PROMPTS)
    ]
    assert all(one.done.wait(120) for one in sent) and not streams.errors
    streams.close()
    assert [one.ids() for one in sent] == alone


def test_guides_and_beams(server):
    guided = stream_one(
        server,
        "ensemble",
        text_input="A number:",
        max_tokens=8,
        guided_decoding_guide_type="regex",
        guided_decoding_guide="[0-9]{4}",
    )
    assert guided.text.isdigit() and len(guided.text) == 4
    beams = generate(
        server, {"text_input": "One, two,", "beam_width": 2, "max_tokens": 6, "temperature": 0.0}
    )
    assert beams[0] == 200


def the_rank(server: TritonServer) -> psutil.Process:
    return next(p for p in server.processes() if "pagetide.engine.rank" in p.cmdline())


def kill(rank: psutil.Process) -> None:
    rank.kill()


def hang(rank: psutil.Process) -> None:
    rank.send_signal(signal.SIGSTOP)


@pytest.mark.parametrize("harm", [kill, hang])
def test_a_lost_rank_takes_the_engine_down_and_up_again(server, harm: Callable[[psutil.Process], None]):
    restarts = metric(server, "pagetide_engine_restarts")
    streams = [Streams(server) for _ in range(8)]
    sent = [
        one.send(
            "ensemble", f"s{i}", text_input=PROMPTS[i % 4], max_tokens=2000, ignore_eos=True, stream=True
        )
        for i, one in enumerate(streams)
    ]
    wait_for(lambda: all(one.responses for one in sent), 60, "first responses")
    rank = the_rank(server)
    harm(rank)
    for stream in sent:
        assert stream.done.wait(60), "no error"
        assert len(stream.errors) == 1 and "the engine failed while it was" in stream.errors[0]
    wait_for(lambda: generate(server, {"text_input": "Hi", "max_tokens": 3})[0] == 200, 60, "an engine again")
    assert metric(server, "pagetide_engine_restarts") == restarts + 1
    wait_for(
        lambda: not rank.is_running() or rank.status() == psutil.STATUS_ZOMBIE, 10, "the lost rank's end"
    )
    assert the_rank(server).pid != rank.pid
    for one in streams:
        one.close()


def test_a_rank_lost_by_an_idle_engine_is_noticed(server):
    wait_until_idle(server)
    restarts = metric(server, "pagetide_engine_restarts")
    kill(the_rank(server))
    wait_for(lambda: metric(server, "pagetide_engine_restarts") == restarts + 1, 30, "a restart")
    assert "rank 1 has ended (signal 9)" in server.log.read_text()
    wait_for(lambda: generate(server, {"text_input": "Hi", "max_tokens": 3})[0] == 200, 60, "an engine again")
