"""The engine in its process: serves requests from a local socket, one message per batch in, one per step
and client out.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass

import msgspec
import zmq

from pagetide.config import Settings
from pagetide.engine.assemble import assemble
from pagetide.engine.engine import Engine
from pagetide.engine.lookout import Lookout
from pagetide.engine.messages import (
    BEAT_PREFIX,
    ERROR_PREFIX,
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
from pagetide.engine.requests import Refusal
from pagetide.types import EngineError, Output, QueueFullError, RequestError

log = logging.getLogger("pagetide.engine")

_REPORT_S = 0.25
_FORGIVEN_S = 60  # after its end a drain that nothing has followed is forgotten
_STOPPING = "the server is stopping and takes no more requests; send it to another one, or again later"
_CUT = "the server is stopping and has not waited longer for this answer; send the request again"


@dataclass
class Draining:
    """client: who has asked for it. end: in seconds of the monotonic clock."""

    client: bytes
    end: float
    num_found: int
    num_cut: int = 0
    is_told: bool = False


class EngineServer:
    """Moves messages between a ROUTER socket and the engine."""

    def __init__(self, engine: Engine, socket: zmq.Socket[bytes]):
        self._engine = engine
        self._socket = socket
        self._ready = Ready(engine.info)
        self._decoder = msgspec.msgpack.Decoder(ToEngine)
        self._client_of: dict[int, bytes] = {}  # request number -> who sent it
        self._unfinished: dict[int, int] = {}  # request number -> sequences that have not ended
        self._watchers: set[bytes] = set()  # clients that want statistics
        self._reported_at = 0.0
        self._reported: tuple[dict[str, int], dict[str, int]] | None = None  # gauges and counters
        self._drain: Draining | None = None
        self._num_rounds = 0
        self._is_waiting = True  # for messages, with nothing to compute

    def run(self) -> None:
        """Serves for ever."""
        while True:
            # Waits for messages only when there is nothing to compute.
            self._is_waiting = not self._engine.has_work
            has_mail = self._socket.poll(1000 if self._is_waiting else 0)
            self._is_waiting = False
            self._num_rounds += 1
            if has_mail:
                self._receive_all()
            if self._engine.has_work:
                outputs, refusals = self._engine.step()
                self._send_outputs(outputs)
                self._send_refusals(refusals)
            if self._drain is not None:
                self._follow(self._drain)
            self._send_statistics()

    def beat(self, lookout: Lookout) -> None:
        """Says once a second on standard output at which round it is."""
        while True:
            number = 0 if self._is_waiting else self._num_rounds
            sys.stdout.write(f"{BEAT_PREFIX}{number}\n")
            sys.stdout.flush()
            lookout.look(number, time.monotonic())
            time.sleep(1)

    def _receive_all(self) -> None:
        while self._socket.poll(0):
            client, body = self._socket.recv_multipart()
            self._handle(client, self._decoder.decode(body))

    def _handle(self, client: bytes, message: ToEngine) -> None:
        match message:
            case Hello(wants_statistics):
                self._send(client, self._ready)
                if wants_statistics:
                    self._watchers = {client}  # the only one: a client that comes again has a new name
            case Submit(requests):
                for request in requests:
                    if self._drain is not None:
                        refusal = Refused.because_of(request.number, QueueFullError(_STOPPING))
                        self._send(client, refusal)
                        continue
                    self._client_of[request.number] = client
                    self._unfinished[request.number] = request.params.n
                    try:
                        self._engine.add(request)
                    except (QueueFullError, RequestError, EngineError) as error:
                        self._send(client, Refused.because_of(request.number, error))
                        self._forget(request.number)
            case Cancel(numbers, request_id):
                self._engine.cancel(numbers, request_id)
            case Drain(timeout_s):
                log.info("takes no more requests; those that it has may take %g s", timeout_s)
                self._drain = Draining(client, time.monotonic() + timeout_s, len(self._client_of))

    def _follow(self, drain: Draining) -> None:
        """Ends what has not ended in time; says so when nothing is left."""
        if self._client_of and time.monotonic() > drain.end:
            numbers = list(self._client_of)
            self._engine.cancel(numbers)
            for number in numbers:
                self._send(self._client_of[number], Refused.because_of(number, EngineError(_CUT)))
                self._forget(number)
            drain.num_cut += len(numbers)
        if not self._client_of and not drain.is_told:
            self._send(drain.client, Drained(drain.num_found, drain.num_cut))
            drain.is_told = True
        if time.monotonic() > drain.end + _FORGIVEN_S:
            log.warning("the server has not been stopped after all: takes requests again")
            self._drain = None

    def _send_outputs(self, outputs: list[Output]) -> None:
        by_client: dict[bytes, list[Output]] = {}
        for output in outputs:
            if output.number not in self._client_of:  # it was cut
                continue
            by_client.setdefault(self._client_of[output.number], []).append(output)
            if output.finish_reason:
                self._unfinished[output.number] -= 1
                if not self._unfinished[output.number]:
                    self._forget(output.number)
        for client, its_outputs in by_client.items():
            self._send(client, Outputs(its_outputs))

    def _send_refusals(self, refusals: list[Refusal]) -> None:
        for refusal in refusals:
            if refusal.number in self._client_of:
                self._send(self._client_of[refusal.number], Refused.because_of(refusal.number, refusal.error))
                self._forget(refusal.number)

    def _send_statistics(self) -> None:
        """Four times a second, and at once when the last request has ended."""
        now = time.monotonic()
        if not self._watchers or (now - self._reported_at < _REPORT_S and self._engine.has_work):
            return
        self._reported_at = now
        news = self._engine.statistics()
        report = news.gauges, news.counters
        if report != self._reported or any(news.observations.values()):
            self._reported = report
            for client in self._watchers:
                self._send(client, news)

    def _forget(self, number: int) -> None:
        del self._client_of[number], self._unfinished[number]

    def _send(self, client: bytes, message: FromEngine) -> None:
        self._socket.send_multipart([client, msgspec.msgpack.encode(message)])


def _tell(reason: str) -> None:
    """Says on standard output why this process ends."""
    print(f"{ERROR_PREFIX}{reason}".replace("\n", " "), flush=True)


def _end_without_rank(reason: str) -> None:
    """A step can never end any more: whoever started this process starts all ranks again."""
    _tell(reason)
    log.error("ends, since its ranks have lost one: %s", reason)
    os._exit(1)


def serve(settings_json: str, address: str) -> int:
    """Loads the model and serves for ever. Says on standard output why it could not, behind ERROR_PREFIX."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", stream=sys.stderr)
    # Ctrl-C in a terminal reaches the whole group: the server decides when the engine ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        begin = time.monotonic()
        engine = assemble(msgspec.json.decode(settings_json, type=Settings), _end_without_rank)
    except Exception as error:
        _tell(f"{type(error).__name__}: {error}")
        raise
    log.info("ready in %.1f s: %s", time.monotonic() - begin, engine.info)
    socket = zmq.Context.instance().socket(zmq.ROUTER)
    # A client that reads slowly gets its messages later; none is dropped.
    socket.sndhwm = socket.rcvhwm = 0
    socket.bind(address)
    server = EngineServer(engine, socket)
    beat = threading.Thread(
        target=server.beat, args=[Lookout(threading.get_ident())], name="pagetide-beat", daemon=True
    )
    beat.start()
    try:
        server.run()
    except Exception as error:
        _tell(f"{type(error).__name__}: {error}")
        raise
    return 0
