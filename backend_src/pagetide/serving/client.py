"""The way from a stub process to the engine."""

from __future__ import annotations

import logging
import os
import queue
import re
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import zmq
import zmq.utils.monitor

from pagetide.engine.messages import (
    Cancel,
    Drain,
    Drained,
    FromEngine,
    Hello,
    Outputs,
    Ready,
    Refused,
    Submit,
    ToEngine,
)
from pagetide.engine.statistics import Statistics
from pagetide.folders import private_folder
from pagetide.types import EngineInfo, Output, Request

log = logging.getLogger("pagetide.client")

_MAX_SOCKET_PATH = 107  # sockaddr_un's 108 bytes with a zero at the end
_SEND_TIMEOUT_MS = 1000
_DRAINED_S = 5  # in which an engine ends what it has cut
_DELIVERED_S = 2.0  # in which the last chunks have gone through Triton
NOT_RUNNING = "the engine is not running; it is being started again"


class EngineStartError(RuntimeError):
    """The engine did not become ready; the message says why."""


def socket_path(server_pid: int, engine: str = "") -> Path:
    """Where the engine of this name, of the Triton server with this process id, listens.

    Raises EngineStartError if no such place is safe.
    """
    try:
        folder = private_folder()
    except PermissionError as error:
        raise EngineStartError(str(error)) from None
    path = folder / f"engine-{server_pid}{f'-{engine}' if engine else ''}.sock"
    if len(os.fsencode(path)) > _MAX_SOCKET_PATH:
        raise EngineStartError(
            f"{path} is too long for a socket (more than {_MAX_SOCKET_PATH} bytes); set TMPDIR to "
            "a shorter path"
        )
    return path


class EngineClient:
    """Sends requests to the engine and hands on what comes back.

    All callbacks run on the client's own thread.

    on_outputs: what a step brought. on_refused(number, error): a request that the engine does not take, and
    what its client is told.
    on_ready: there is an engine, at first or again. on_lost: it is gone, and with it everything that was sent
    to it. on_statistics: called a few times a second, if given.
    """

    def __init__(
        self,
        path: Path,
        on_outputs: Callable[[list[Output]], None],
        on_refused: Callable[[int, Exception], None],
        on_lost: Callable[[], None],
        on_statistics: Callable[[Statistics], None] | None = None,
        on_ready: Callable[[], None] = lambda: None,
    ):
        self._on_statistics = on_statistics
        self._on_outputs = on_outputs
        self._on_refused = on_refused
        self._on_lost = on_lost
        self._on_ready = on_ready
        self._decoder = msgspec.msgpack.Decoder(FromEngine)
        self._to_send: queue.SimpleQueue[tuple[bytes, list[int]] | None] = (
            queue.SimpleQueue()
        )  # (message, numbers of the requests in it)
        self._wake_read, self._wake_write = os.pipe()
        self._connected = threading.Event()
        self.engine: EngineInfo | None = None
        self._socket = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.sndhwm = self._socket.rcvhwm = 0
        self._socket.linger = 0
        # A connection that has just been made takes its first message a moment later; one that is gone
        # takes none.
        self._socket.sndtimeo = _SEND_TIMEOUT_MS
        self._socket.reconnect_ivl, self._socket.reconnect_ivl_max = 20, 200
        # Messages go to an engine that is there, or nowhere: never to one that is started later.
        self._socket.immediate = True
        self._monitor = self._socket.get_monitor_socket(
            zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
        )
        self._socket.connect(f"ipc://{path}")
        self._thread = threading.Thread(target=self._run, name="pagetide-client", daemon=True)
        self._thread.start()

    @property
    def is_ready(self) -> bool:
        """True while there is an engine to talk to."""
        return self._connected.is_set()

    def wait_until_ready(self, timeout_s: float) -> bool:
        """False if there is no engine when the time is up."""
        return self._connected.wait(timeout_s)

    def submit(self, requests: list[Request]) -> None:
        """Sends requests; those that cannot be delivered are refused through on_refused.

        Raises what cannot be written as a message.
        """
        self._post(Submit(requests), [request.number for request in requests])

    def cancel(self, numbers: list[int], request_id: str = "") -> None:
        """Ends requests; those that have ended already are left alone."""
        self._post(Cancel(numbers, request_id))

    def close(self) -> None:
        """Sends what is left, and ends the thread."""
        self._to_send.put(None)
        os.write(self._wake_write, b"x")
        self._thread.join()

    def _post(self, message: ToEngine, numbers: list[int] | None = None) -> None:
        self._to_send.put((msgspec.msgpack.encode(message), numbers or []))
        os.write(self._wake_write, b"x")

    def _run(self) -> None:
        poller = zmq.Poller()
        for source in (self._socket, self._monitor, self._wake_read):
            poller.register(source, zmq.POLLIN)
        is_open = True
        while is_open:
            ready = dict(poller.poll())
            try:
                # Answers first: an engine that died may have said something before.
                if self._socket in ready:
                    self._receive_all()
                if self._monitor in ready:
                    self._follow_connection()
                if self._wake_read in ready:
                    os.read(self._wake_read, 4096)
                    is_open = self._send_all()
            except Exception:
                # Only a bug comes here. This thread must live on, and nobody may wait for what it has lost.
                log.exception("the engine's client failed; all open requests fail with it, or begin again")
                self._on_lost()
                if self._connected.is_set():
                    self._on_ready()
        self._socket.disable_monitor()
        self._socket.close()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def _receive_all(self) -> None:
        while self._socket.poll(0):
            match self._decoder.decode(self._socket.recv()):
                case Outputs(outputs):
                    self._on_outputs(outputs)
                case Refused() as refused:
                    self._on_refused(refused.number, refused.error)
                case Statistics() as statistics:
                    if self._on_statistics is not None:
                        self._on_statistics(statistics)
                case Ready(info):
                    self.engine = info
                    self._connected.set()
                    self._on_ready()

    def _follow_connection(self) -> None:
        event = zmq.utils.monitor.recv_monitor_message(self._monitor)["event"]
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._send(msgspec.msgpack.encode(Hello(wants_statistics=self._on_statistics is not None)))
        elif event == zmq.EVENT_DISCONNECTED:
            self._connected.clear()
            self._on_lost()

    def _send_all(self) -> bool:
        """Sends what has been posted; False when the client is to be closed."""
        while not self._to_send.empty():
            posted = self._to_send.get()
            if posted is None:
                return False
            message, numbers = posted
            if not self._connected.is_set() or not self._send(message):
                for number in numbers:
                    self._on_refused(number, ConnectionError(NOT_RUNNING))
        return True

    def _send(self, message: bytes) -> bool:
        """False if the engine has gone meanwhile: waiting for the next one would stop this thread, and with
        it every answer.
        """
        try:
            self._socket.send(message)
        except zmq.Again:
            # What waits behind it would wait as long, and the news of the end with it.
            self._connected.clear()
            return False
        return True


def drain(server_pid: int, timeout_s: float) -> int:
    """Brings all engines of a server to an end before it is told to stop, since what is under way when Triton
    stops never ends: they take no more requests, and what has not been answered in time ends with an error.
    Returns how many that were. An engine that is not there is not waited for.
    """
    poller, sockets = zmq.Poller(), []
    own = re.compile(rf"engine-{server_pid}(-.*)?\.sock")
    for path in private_folder().iterdir():
        if not own.fullmatch(path.name) or not _is_listening(path):
            continue
        sockets.append(engine := zmq.Context.instance().socket(zmq.DEALER))
        engine.linger = 0
        engine.connect(f"ipc://{path}")
        engine.send(msgspec.msgpack.encode(Drain(timeout_s)))
        poller.register(engine, zmq.POLLIN)
    answers: list[Drained] = []
    end = time.monotonic() + timeout_s + _DRAINED_S
    while len(answers) < len(sockets) and (left := end - time.monotonic()) > 0:
        answers += [
            msgspec.msgpack.decode(one.recv(), type=Drained) for one, _ in poller.poll(int(left * 1000))
        ]
    for engine in sockets:
        engine.close()
    if any(answer.num_found for answer in answers):
        time.sleep(_DELIVERED_S)
    return sum(answer.num_cut for answer in answers)


def _is_listening(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True
