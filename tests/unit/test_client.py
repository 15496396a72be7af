"""The way from stubs to the engine, on real sockets and processes: what happens when one side goes, or is
not alone.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from pagetide.config import Settings
from pagetide.engine.messages import FromEngine, Outputs, Ready, Refused, ToEngine
from pagetide.serving.client import EngineClient, EngineStartError, socket_path
from pagetide.serving.supervisor import EngineSupervisor, _exclusive_lock
from pagetide.types import (
    EngineError,
    EngineInfo,
    Output,
    QueueFullError,
    Request,
    RequestError,
    SamplingParams,
)

INFO = EngineInfo(
    "",
    vocab_size=9,
    max_model_len=9,
    max_num_seqs=1,
    pad_id=0,
    device="cpu",
    num_blocks=9,
    block_size=4,
    allows_logits=False,
)


class Engine:
    """The other end of the socket."""

    def __init__(self, path: Path):
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.ROUTER)
        self.socket.bind(f"ipc://{path}")

    def receive(self) -> tuple[bytes, ToEngine]:
        assert self.socket.poll(30_000), "nothing came"
        client, body = self.socket.recv_multipart()
        return client, msgspec.msgpack.decode(body, type=ToEngine)

    def send(self, client: bytes, message: FromEngine) -> None:
        self.socket.send_multipart([client, msgspec.msgpack.encode(message)])

    def end(self) -> None:
        self.socket.close(linger=0)
        self.context.term()


class Heard:
    """What a client was told."""

    def __init__(self, path: Path):
        self.refused: dict[int, Exception] = {}
        self.outputs: list[Output] = []
        self.lost = threading.Event()
        self.changed = threading.Condition()
        self.client = EngineClient(path, self._on_outputs, self._on_refused, self.lost.set)

    def _on_outputs(self, outputs: list[Output]) -> None:
        with self.changed:
            self.outputs += outputs
            self.changed.notify_all()

    def _on_refused(self, number: int, error: Exception) -> None:
        with self.changed:
            self.refused[number] = error
            self.changed.notify_all()

    def wait_for(self, number: int) -> None:
        """Until this request has been answered or refused."""

        def is_known() -> bool:
            return number in self.refused or any(output.number == number for output in self.outputs)

        with self.changed:
            assert self.changed.wait_for(is_known, 30), f"nothing was heard of {number}"


def request(number: int) -> Request:
    return Request(number=number, prompt_ids=[1], params=SamplingParams())


def test_requests_to_an_engine_that_has_gone_are_refused_and_the_next_engine_gets_new_ones(tmp_path):
    path = tmp_path / "engine.sock"
    heard = Heard(path)
    for number in (1, 2, 3):
        engine = Engine(path)
        client, _ = engine.receive()
        engine.send(client, Ready(INFO))
        assert heard.client.wait_until_ready(30)
        heard.client.submit([request(number)])
        client, message = engine.receive()
        assert message.requests[0].number == number, "never one that was meant for another engine"
        engine.send(client, Outputs([Output(number, 0, [1], finish_reason="stop")]))
        heard.wait_for(number)
        heard.lost.clear()
        engine.end()
        # Whether the client has noticed yet or not: it is never blocked.
        heard.client.submit([request(10 + number)])
        assert heard.lost.wait(30)
        heard.client.submit([request(20 + number)])
        heard.wait_for(20 + number)
    assert [output.number for output in heard.outputs] == [1, 2, 3]
    assert {21, 22, 23} <= set(heard.refused) and all(
        isinstance(e, ConnectionError) for e in heard.refused.values()
    )
    heard.client.close()


@pytest.mark.parametrize("error", [RequestError("wrong"), QueueFullError("full"), EngineError("ours")])
def test_a_refusal_is_the_same_error_on_both_sides(tmp_path, error):
    refused = msgspec.msgpack.decode(msgspec.msgpack.encode(Refused.because_of(3, error)), type=FromEngine)
    assert type(refused.error) is type(error) and str(refused.error) == str(error) and refused.number == 3


def test_what_cannot_be_written_as_a_message_fails_where_it_was_sent(tmp_path):
    heard = Heard(tmp_path / "engine.sock")
    with pytest.raises(OverflowError, match="can't serialize ints"):
        heard.client.submit([Request(number=2**70, prompt_ids=[1], params=SamplingParams())])
    assert not heard.lost.is_set()
    heard.client.close()


def test_only_one_of_a_server_runs_an_engine(tmp_path):
    held = _exclusive_lock(tmp_path / "engine.lock", "llm_0_0")
    with pytest.raises(EngineStartError, match="another model of this server runs its engine already"):
        EngineSupervisor(Settings(), tmp_path / "engine.sock", "llm_0_1", print)
    held.close()


def test_the_same_model_waits_for_the_end_of_its_engine(tmp_path):
    """Loaded again, while what was unloaded answers its last requests; its file is removed at the end."""
    file = tmp_path / "engine.lock"
    first = _exclusive_lock(file, "llm_0_0")
    second: list[Any] = []
    waiting = threading.Thread(target=lambda: second.append(_exclusive_lock(file, "llm_0_0")))
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()
    file.unlink()
    first.close()
    waiting.join(10)
    assert second and file.read_text() == "llm_0_0"
    with pytest.raises(EngineStartError):
        _exclusive_lock(file, "other_0_0")
    second[0].close()


@pytest.mark.parametrize("mode", [0o777, 0o720])
def test_a_folder_that_others_can_write_to_is_refused(tmp_path, monkeypatch, mode):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = socket_path(1).parent
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(mode)
    with pytest.raises(EngineStartError, match="must be a folder that only user"):
        socket_path(1)
    folder.chmod(0o700)
    if os.getuid() == 0:
        os.chown(folder, 12345, 12345)
        with pytest.raises(EngineStartError, match="must be a folder that only user 0"):
            socket_path(1)


def test_a_link_in_the_folders_place_is_refused(tmp_path, monkeypatch):
    (tmp_path / "theirs").mkdir(mode=0o700)
    (tmp_path / f"pagetide-{os.getuid()}").symlink_to(tmp_path / "theirs")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(EngineStartError, match="must be a folder"):
        socket_path(1)


def test_a_path_too_long_for_a_socket_says_so(tmp_path, monkeypatch):
    (tmp_path / ("x" * 120)).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("x" * 120)))
    with pytest.raises(EngineStartError, match="is too long for a socket"):
        socket_path(1)


def test_an_engine_ends_with_its_parent_while_it_still_loads(tmp_path):
    """The parent dies before the engine has imported anything."""
    script = (
        "import os, subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-m', 'pagetide.engine', str(os.getpid()), '{}', 'ipc:///nowhere'])\n"
        "print(child.pid, flush=True)\n"
        "os._exit(0)\n"
    )
    source = str(Path(__file__).parents[2] / "backend_src")
    parent = subprocess.run(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": source},
        timeout=60,
    )
    pid = int(parent.stdout.split()[0])
    for _ in range(600):
        if not is_running(pid):
            return
        threading.Event().wait(0.1)
    raise AssertionError("the engine is still there")


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] not in "ZX"
    except FileNotFoundError:
        return False
