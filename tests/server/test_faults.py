"""Clients that leave, engines that die, requests that make no sense: nobody else is disturbed, and nothing
is left over.
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest
import tritonclient.grpc as grpc
from client import CACHE, Streams, generate, metric, start, stream_one, wait_for, wait_until_idle
from pagetide.engine.lookout import LONG_S
from parrot import TEXT, pieces_of, write_parrot
from processes import ServerError
from triton_server import REPOSITORY, ROOT, TritonServer, free_address
from tritonclient.utils import InferenceServerException

LONG = {"input_ids": [1], "max_tokens": 30_000, "temperature": 0.0, "stream": True, "ignore_eos": True}


def open_http_stream(server, body: dict) -> socket.socket:
    """A raw HTTP client of generate_stream that has read the first bytes of the answer."""
    data = json.dumps(body).encode()
    client = socket.create_connection((server.address.host, server.address.http_port))
    client.settimeout(60)
    head = (
        f"POST /v2/models/ensemble/generate_stream HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    client.sendall(head.encode() + data)
    assert client.recv(64).startswith(b"HTTP/1.1 200")
    return client


def memory_mb(server) -> float:
    return sum(process.memory_info().rss for process in server.processes()) / 2**20


def cancel_by_grpc(server, count: int, how_many=any) -> None:
    """Cancels when any, or all, of the streams have begun to answer."""
    streams = Streams(server)
    sent = [streams.send("ensemble", f"g{i}", **LONG) for i in range(count)]
    wait_for(lambda: how_many(s.responses for s in sent), 60, "first responses")
    streams.close(cancel=True)


def cancel_by_leaving_http(server, count: int) -> None:
    clients = [open_http_stream(server, {**LONG, "stream": True}) for _ in range(count)]
    for client in clients:
        client.close()


def cancel_by_request(server, count: int) -> None:
    streams = Streams(server)
    sent = [streams.send("ensemble", f"c{i}", **LONG) for i in range(count)]
    # All of them: on another connection a cancel may overtake a request that has not been answered yet.
    wait_for(lambda: all(s.responses for s in sent), 60, "first responses")
    other = Streams(server)
    answers = [other.send("ensemble", f"c{i}", cancel=True) for i in range(count)]
    for stream in sent:
        assert stream.done.wait(60) and not stream.errors
        assert stream.reason == "cancelled"
    assert all(a.done.wait(60) and a.reason == "cancelled" and a.text == "" for a in answers)
    streams.close()
    other.close()


@pytest.mark.parametrize("way", [cancel_by_grpc, cancel_by_leaving_http, cancel_by_request])
def test_each_way_to_cancel_frees_everything_at_once(parrot, way):
    way(parrot, 8)
    wait_until_idle(parrot)


def test_a_cancelled_direct_call_of_llm_frees_everything(parrot):
    streams = Streams(parrot)
    sent = streams.send("llm", "direct", **LONG)
    wait_for(lambda: bool(sent.responses), 30, "a first response")
    streams.close(cancel=True)
    wait_until_idle(parrot)


def test_a_thousand_cancelled_streams_leave_nothing_behind(tmp_path):
    """A server of its own, so that its stop shows whether a request is still in flight."""
    write_parrot(tmp_path, pieces_of(TEXT, 2), ends=False)
    server = start({"model": str(tmp_path), "max_num_seqs": 64, "check_integrity": False})
    cancel_by_grpc(server, 50)
    wait_until_idle(server)
    before = memory_mb(server)
    for _ in range(8):
        cancel_by_grpc(server, 60, all)
        cancel_by_leaving_http(server, 30)
        cancel_by_request(server, 30)
        wait_until_idle(server)
    # Of the first 50 some never reached the engine.
    assert metric(server, "pagetide_requests_cancelled") >= 8 * 120
    assert memory_mb(server) < before + 150
    assert stream_one(server, **{**LONG, "max_tokens": 5}).reason == "length"
    assert server.stop(), "requests were still in flight"
    assert "Timeout 5: Found 0 model versions that have in-flight inferences" in server.log.read_text()
    assert not [p for p in server.processes() if p.is_running()]


def test_a_killed_engine_gives_each_stream_one_error_and_comes_back(tmp_path):
    write_parrot(tmp_path, pieces_of(TEXT, 2), ends=False)
    server = start({"model": str(tmp_path), "num_blocks": 4000})
    streams = [Streams(server) for _ in range(16)]
    sent = [s.send("ensemble", f"k{i}", **LONG) for i, s in enumerate(streams)]
    wait_for(lambda: all(s.responses for s in sent), 60, "first responses")
    engine = next(p for p in server.processes() if "pagetide.engine" in p.cmdline())
    engine.send_signal(signal.SIGKILL)
    for stream in sent:
        assert stream.done.wait(60), "no error"
        assert (
            len(stream.errors) == 1
            and "the engine failed while it was working on this request" in stream.errors[0]
        )
    status, answer = generate(server, {"input_ids": [1], "max_tokens": 3})
    if status != 200:
        assert (
            status in (400, 503) and "the engine is not running; it is being started again" in answer["error"]
        )
    wait_for(
        lambda: generate(server, {"input_ids": [1], "max_tokens": 3})[0] == 200,
        60,
        "an engine that works again",
    )
    assert stream_one(server, **{**LONG, "max_tokens": 4}).ids() == [2, 3, 4, 5]
    wait_until_idle(server)
    assert metric(server, "pagetide_engine_restarts") == 1
    assert metric(server, "pagetide_requests_failed") == 16
    for one in streams:
        one.close()
    processes = server.processes()
    server.stop()
    assert not [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def test_requests_without_an_answer_begin_again_once(tmp_path):
    """Two run, and have been answered in part; two wait; one is answered as a whole. The second death is one
    too many for what still runs then.
    """
    write_parrot(tmp_path, pieces_of(TEXT, 2), ends=False)
    server = start({"model": str(tmp_path), "num_blocks": 9000, "max_num_seqs": 2})
    streams = [Streams(server) for _ in range(4)]

    def kill_engine() -> None:
        next(p for p in server.processes() if "pagetide.engine" in p.cmdline()).kill()

    running = [s.send("ensemble", f"r{i}", **LONG) for i, s in enumerate(streams[:2])]
    wait_for(lambda: all(s.responses for s in running), 60, "first responses")
    waiting = [s.send("ensemble", f"w{i}", **{**LONG, "max_tokens": 20}) for i, s in enumerate(streams[2:])]
    with ThreadPoolExecutor() as pool:
        whole = pool.submit(generate, server, {"input_ids": [1], "max_tokens": 25_000, "ignore_eos": True})
        wait_for(lambda: metric(server, "pagetide_requests_waiting") == 3, 30, "three that wait")
        kill_engine()
        for stream in running:
            assert stream.done.wait(60)
            assert len(stream.errors) == 1 and "the engine failed while it was" in stream.errors[0]
        for stream in waiting:
            assert stream.done.wait(60) and not stream.errors
            assert stream.ids() == list(range(2, 22)) and stream.reason == "length"
        wait_for(lambda: metric(server, "pagetide_requests_running") == 1, 30, "the whole answer's request")
        kill_engine()
        status, answer = whole.result(60)
    assert status in (400, 500) and "the engine failed while it was" in answer["error"], (status, answer)
    wait_until_idle(server)
    for one in streams:
        one.close()
    server.stop()


def test_requests_that_begin_again_can_end_while_there_is_no_engine(tmp_path):
    """The next engine is stopped before it can listen."""
    write_parrot(tmp_path, pieces_of(TEXT, 2), ends=False)
    server = start({"model": str(tmp_path), "num_blocks": 9000, "max_num_seqs": 1})
    streams = [Streams(server) for _ in range(3)]
    running = streams[0].send("ensemble", "running", **LONG)
    wait_for(lambda: bool(running.responses), 60, "a first response")
    late = streams[1].send("ensemble", "late", **LONG, timeout_ms=10_000)
    unwanted = streams[2].send("ensemble", "unwanted", **LONG)
    wait_for(lambda: metric(server, "pagetide_requests_waiting") == 2, 30, "two that wait")
    first = engine_of(server)
    assert first is not None
    first.kill()
    wait_for(lambda: engine_of(server) not in (None, first), 30, "the next engine")
    second = engine_of(server)
    assert second is not None
    second.suspend()
    assert running.done.wait(60) and late.done.wait(60) and not late.errors
    assert late.reason == "timeout"
    cancel = Streams(server)
    assert cancel.send("ensemble", "unwanted", cancel=True).done.wait(60)
    assert unwanted.done.wait(60) and not unwanted.errors
    assert unwanted.reason == "cancelled"
    second.resume()
    wait_for(lambda: generate(server, {"input_ids": [1], "max_tokens": 3})[0] == 200, 60, "an engine")
    wait_until_idle(server)
    for one in (*streams, cancel):
        one.close()
    server.stop()


def engine_of(server: TritonServer) -> psutil.Process | None:
    """None between two engines."""
    found = [process for process in server.processes() if is_engine(process)]
    return found[0] if found else None


def is_engine(process: psutil.Process) -> bool:
    try:
        return "pagetide.engine" in process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return False


def test_a_stuck_engine_is_ended_and_comes_back(tmp_path):
    """One that is stopped says nothing and computes nothing."""
    write_parrot(tmp_path, pieces_of(TEXT, 2), ends=False)
    server = start({"model": str(tmp_path), "num_blocks": 4000, "step_timeout_s": 3})
    assert ask_health(server) == (0, "the engine answers")
    streams = [Streams(server) for _ in range(4)]
    sent = [s.send("ensemble", f"s{i}", **LONG) for i, s in enumerate(streams)]
    wait_for(lambda: all(s.responses for s in sent), 60, "first responses")
    engine = next(p for p in server.processes() if "pagetide.engine" in p.cmdline())
    engine.send_signal(signal.SIGSTOP)
    assert ask_health(server, "--timeout", "2")[0] == 1
    for stream in sent:
        assert stream.done.wait(60), "no error"
        assert len(stream.errors) == 1 and "the engine failed while it was" in stream.errors[0]
    wait_for(lambda: ask_health(server) == (0, "the engine answers"), 60, "an engine that works again")
    assert "the engine is ended: it gave no sign of life for 4 s" in server.log.read_text()
    wait_until_idle(server)
    assert metric(server, "pagetide_engine_restarts") == 1
    for one in streams:
        one.close()
    assert ask_health(server, question="live") == (0, "Triton is live")
    server.stop()
    status, said = ask_health(server)
    assert status == 1 and said.startswith("not ready: nothing answers at")


def test_a_pause_of_the_machine_ends_nothing_and_is_told(parrot):
    stream = Streams(parrot)
    sent = stream.send("ensemble", "paused", **{**LONG, "max_tokens": 3000})
    wait_for(lambda: sent.responses, 60, "a first response")
    engine = next(p for p in parrot.processes() if "pagetide.engine" in p.cmdline())
    engine.send_signal(signal.SIGSTOP)
    time.sleep(LONG_S + 2)
    engine.send_signal(signal.SIGCONT)
    assert sent.done.wait(120) and not sent.errors
    wait_for(lambda: "nothing ran here for" in parrot.log.read_text(), 60, "a line in the log")
    stream.close()


def ask_health(server: TritonServer, *options: str, question: str = "ready") -> tuple[int, str]:
    """Exit code and sentence of scripts/health.py."""
    ports = ("--http-port", server.address.http_port, "--metrics-port", server.address.metrics_port)
    command = [sys.executable, str(ROOT / "scripts" / "health.py"), question, *map(str, ports), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout.strip()


class TwoInstances(TritonServer):
    """`llm` with two instances, which would be two engines."""

    def _make_repository(self) -> None:
        super()._make_repository()
        own = self.folder / "models" / "llm"
        own.unlink()
        own.mkdir()
        (own / "1").symlink_to(REPOSITORY / "llm" / "1")
        config = (REPOSITORY / "llm" / "config.pbtxt").read_text()
        assert "count: 1" in config
        (own / "config.pbtxt").write_text(config.replace("count: 1", "count: 2"))


def test_a_second_engine_of_one_server_is_refused_with_the_reason(tmp_path):
    write_parrot(tmp_path, pieces_of(TEXT, 2), ends=False)
    server = TwoInstances(free_address(), {"cache_dir": CACHE, "model": str(tmp_path)})
    server.start()
    with pytest.raises(ServerError, match="another model of this server runs its engine already"):
        server.wait_until_ready()
    server.stop()
    assert not server.processes()


def test_an_engine_whose_stub_dies_while_it_loads_ends_too():
    server = TritonServer(free_address(), {"cache_dir": CACHE})
    server.start()
    assert ask_health(server)[0] == 1, "models load"

    def engine() -> psutil.Process | None:
        return next((p for p in server.processes() if "pagetide.engine" in p.cmdline()), None)

    wait_for(lambda: engine() is not None, what="an engine that loads")
    loading = engine()
    loading.parent().send_signal(signal.SIGKILL)
    wait_for(
        lambda: not loading.is_running() or loading.status() == psutil.STATUS_ZOMBIE,
        what="an engine that is gone",
    )
    server.stop()
    assert not server.processes()


def test_a_full_queue_is_refused_at_once_and_says_so(parrot):
    streams = Streams(parrot)
    sent = [streams.send("ensemble", f"q{i}", **LONG) for i in range(220)]
    # None of them ends before all are there: 30,000 tokens each.
    wait_for(lambda: len(streams.errors) == 20, 120, "a refusal for each request beyond the queue")
    assert all(
        "Exceeds maximum queue size: Maximum queue size of 200 requests reached" in error
        for error in streams.errors
    )
    assert not any(stream.done.is_set() for stream in sent)
    status, said = ask_health(parrot)
    assert status == 1 and "not ready: " in said and "Maximum queue size of 200" in said
    streams.close(cancel=True)
    wait_until_idle(parrot)
    assert stream_one(parrot, **{**LONG, "max_tokens": 4}).ids() == [2, 3, 4, 5]


LAST = 1 + len(pieces_of(TEXT, 2))  # the parrot's last token
BAD = [
    ({"text_input": "x", "temperature": -1.0}, "temperature is -1.0, must be from 0 to"),
    ({"text_input": "x", "temperature": float("nan")}, "temperature is nan, must be a finite number"),
    ({"text_input": "x", "top_p": 1.5}, "top_p is 1.5, must be from 0 to 1"),
    ({"text_input": "x", "top_k": -2}, "top_k is -2, must be from -1"),
    ({"text_input": "x", "max_tokens": 0}, "max_tokens is 0, must be from 1"),
    (
        {"text_input": "x", "min_tokens": 9, "max_tokens": 3},
        "min_tokens is 9, must be at most max_tokens, which is 3",
    ),
    ({"text_input": "x", "end_id": 10**6}, f"end_id is 1000000, must be from -1 to {LAST}"),
    ({"text_input": "x", "num_return_sequences": 65}, "num_return_sequences is 65, must be at most 64"),
    (
        {"text_input": "x", "input_ids": [1]},
        "exactly one of text_input, messages, input_ids; it has text_input and input_ids",
    ),
    ({"temperature": 1.0}, "exactly one of text_input, messages, input_ids; it has none of them"),
    ({"text_input": ""}, "the prompt is empty"),
    ({"text_input": b"\xff\xfe"}, "text_input is not valid UTF-8"),
    ({"input_ids": [1, 500]}, f"input_ids has the token id 500, must be from 0 to {LAST}"),
    ({"input_ids": [-1]}, "input_ids has the token id -1"),
    ({"input_ids": [1] * 32768}, "the prompt has 32768 tokens, must have at most 32767"),
    (
        {"messages": '[{"role": "user", "content": "x"}]'},
        "messages need a chat template, and this model has none",
    ),
    ({"messages": "{"}, "messages is not valid JSON"),
    (
        {"text_input": "x", "sampling_parameters": '{"tempurature": 1}'},
        "'tempurature'; did you mean temperature",
    ),
    (
        {"text_input": "x", "sampling_parameters": "[]"},
        "sampling_parameters is a JSON list, must be an object",
    ),
    ({"text_input": "x", "min_tokens": 1, "min_length": 1}, "min_tokens is given twice"),
    ({"text_input": "x", "stop_words": ["y"] * 65}, "stop_words has 65 texts"),
    ({"cancel": True, "request": ""}, "cancel needs the request_id"),
]


def test_bad_input_is_one_clear_error_each_and_disturbs_nobody(parrot):
    streams = Streams(parrot)
    running = [streams.send("ensemble", f"r{i}", **{**LONG, "max_tokens": 2000}) for i in range(16)]
    wait_for(lambda: all(s.responses for s in running), 60, "first responses")
    for number, (values, message) in enumerate(BAD):
        other = Streams(parrot)
        bad = other.send(
            "ensemble",
            values.get("request", f"b{number}"),
            **{k: v for k, v in values.items() if k != "request"},
        )
        assert bad.done.wait(20), values
        other.close()
        assert len(bad.errors) == 1 and message in bad.errors[0], (message, bad.errors, bad.responses)
        assert not bad.responses
    for stream in running:
        assert stream.done.wait(120) and not stream.errors
        assert len(stream.ids()) == 2000 and stream.text == running[0].text
    streams.close()


@pytest.mark.parametrize(
    "parameters, message",
    [
        ({"temprature": 1}, "did you mean temperature"),
        ({"top_k": "many"}, "top_k is 'many', must be an integer"),
    ],
)
def test_bad_request_parameters_are_told(parrot, parameters, message):
    assert message in stream_one(parrot, parameters=parameters, input_ids=[1]).errors[0]


def test_errors_have_tritons_status_codes(parrot):
    assert generate(parrot, {"text_input": "x", "top_p": 3})[0] == 400
    assert generate(parrot, {"text_input": "x", "no_such": 3})[0] == 400
    with (
        grpc.InferenceServerClient(parrot.address.grpc) as client,
        pytest.raises(InferenceServerException, match=r"StatusCode\.INVALID_ARGUMENT"),
    ):
        tensor = grpc.InferInput("input_ids", [1, 1], "INT32")
        tensor.set_data_from_numpy(np.array([[500]], np.int32))
        client.infer("ensemble_unary", [tensor])
