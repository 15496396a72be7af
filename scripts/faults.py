"""Causes faults on a real server under load; prints what clients saw of each, and for how long.

Users send one prompt after the other, greedy, over gRPC through `ensemble`; what each prompt's answer is was
asked before. Checked of every fault: each request ends with its whole and right answer or with one error; new
requests are answered afterwards; nothing is left over (blocks, sequences, processes, descriptors, threads).

python scripts/faults.py [NAME ...] [--users 16] [--list]
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "backend_src"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "clients"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import psutil
import tritonclient.grpc as grpc
from fuzz import metrics
from grpc_stream import tensor
from triton_server import ROOT, TritonServer, free_address
from tritonclient.utils import InferenceServerException

ANSWER_TIMEOUT_S = 120
RECOVERY_TIMEOUT_S = 180
LOAD_S = 3.0  # before the fault and after it
MAX_TOKENS = 48
PROMPTS = [f"Tell me {n} things about the sea and the {what}." for n in (2, 3) for what in ("moon", "wind")]
PROBE = "What is a tide?"


@dataclass
class Asked:
    """One request and what came of it; times of the monotonic clock, `ended` 0 while nothing has."""

    prompt: str
    sent: float
    text: str = ""
    num_tokens: int = 0
    ended: float = 0.0
    error: str = ""


class Connection:
    """One gRPC stream, on which one prompt at a time is answered."""

    def __init__(self, url: str):
        self._done = threading.Event()
        self._asked = Asked("", 0.0)
        self._client = grpc.InferenceServerClient(url)
        self._client.start_stream(self._receive)

    def ask(self, prompt: str, **more: Any) -> Asked:
        """Waits for the end of the answer, ANSWER_TIMEOUT_S at most. more: inputs of the request."""
        self._done.clear()
        self._asked = one = Asked(prompt, time.monotonic())
        values = {
            "text_input": prompt,
            "max_tokens": MAX_TOKENS,
            "ignore_eos": True,
            "temperature": 0.0,
            "stream": True,
            **more,
        }
        try:
            self._client.async_stream_infer("ensemble", [tensor(*item) for item in values.items()])
        except InferenceServerException as error:  # the stream is broken
            self._end(str(error))
        self._done.wait(ANSWER_TIMEOUT_S)
        return one

    def _receive(self, result: Any, error: Any) -> None:
        if self._asked.ended:  # and this the word of close()
            return
        if error is not None:
            self._end(error.message() or str(error))
            return
        self._asked.text += b"".join(result.as_numpy("text_output").reshape(-1)).decode()
        self._asked.num_tokens += int(result.as_numpy("sequence_length").item())
        if result.get_response().parameters["triton_final_response"].bool_param:
            self._end("")

    def _end(self, error: str) -> None:
        self._asked.error, self._asked.ended = error, time.monotonic()
        self._done.set()

    def close(self) -> None:
        with contextlib.suppress(InferenceServerException):  # one that is broken cannot be stopped in order
            # One that is cancelled after its last answer, and not closed, stays in Triton 2.51 for good.
            self._client.stop_stream(cancel_requests=not self._asked.ended)
        self._client.close()


class User:
    """Asks one prompt after the other, until it is told to stop; the last answer is waited for."""

    def __init__(self, url: str, number: int):
        self._url, self._number = url, number
        self._is_over = threading.Event()
        self.asked: list[Asked] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        connection = Connection(self._url)
        while not self._is_over.is_set():
            one = connection.ask(PROMPTS[(len(self.asked) + self._number) % len(PROMPTS)])
            self.asked.append(one)
            if one.error or not one.ended:
                connection.close()
                self._is_over.wait(0.2)
                connection = Connection(self._url)
        connection.close()

    def stop(self) -> None:
        self._is_over.set()

    def join(self) -> None:
        self._thread.join(ANSWER_TIMEOUT_S + 10)


@dataclass
class Report:
    """errors: by what was said. told_s: from the fault to the last error. recovered_s: from the fault's end,
    or its cause where it ends nothing, to the first right answer.
    """

    name: str
    num_answers: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    told_s: float = 0.0
    recovered_s: float = 0.0
    failures: list[str] = field(default_factory=list)

    def row(self) -> str:
        """Of a Markdown table."""
        errors = "; ".join(f"{count} x {error}" for error, count in self.errors.most_common()) or "none"
        told = f"{self.told_s:.1f} s" if self.errors else ""
        return f"| {self.name} | {self.num_answers} | {errors} | {told} | {self.recovered_s:.1f} s |"


# -- one fault ---------------------------------------------------------------------------------------------


def run(fault: Fault, num_users: int) -> Report:
    """On a server of its own."""
    server = TritonServer(free_address(), {"cache_dir": str(ROOT / ".cache")})
    is_over = threading.Event()
    with mounted(fault, server):
        server.start()
        try:
            server.wait_until_ready()
            threading.Thread(target=_keep_alive, args=(server, is_over), daemon=True).start()
            return _run_under_load(fault, server, num_users)
        finally:
            is_over.set()
            server.stop()


def _keep_alive(server: TritonServer, is_over: threading.Event) -> None:
    """As serve.sh, Docker and Kubernetes do."""
    while not is_over.wait(0.2):
        if not server.is_alive():
            server.start_again()


def _run_under_load(fault: Fault, server: TritonServer, num_users: int) -> Report:
    report = Report(fault.name)
    expected = {prompt: _ask(server, prompt) for prompt in (*PROMPTS, PROBE)}
    before, regions_before = _held(server), regions(server)
    users = [User(server.address.grpc, number) for number in range(num_users)]
    time.sleep(LOAD_S)
    begin = time.monotonic()
    with fault.cause(server):
        pass
    ended = time.monotonic()
    while not _is_right(server, expected[PROBE]):
        if time.monotonic() > ended + RECOVERY_TIMEOUT_S:
            report.failures.append(f"no right answer within {RECOVERY_TIMEOUT_S} s")
            break
        time.sleep(0.1)
    report.recovered_s = time.monotonic() - ended
    time.sleep(LOAD_S)
    for user in users:
        user.stop()
    for user in users:
        user.join()
    _judge(report, [one for user in users for one in user.asked], expected, begin)
    report.failures += _left_over(server, before, regions_before)
    return report


def _ask(server: TritonServer, prompt: str) -> str:
    connection = Connection(server.address.grpc)
    one = connection.ask(prompt)
    connection.close()
    if one.error or not one.ended:
        raise RuntimeError(f"the server does not answer before the fault: {one.error or 'nothing comes'}")
    return one.text


def _is_right(server: TritonServer, expected: str) -> bool:
    connection = Connection(server.address.grpc)
    one = connection.ask(PROBE)
    connection.close()
    return bool(one.ended) and not one.error and one.text == expected


def _judge(report: Report, asked: list[Asked], expected: dict[str, str], begin: float) -> None:
    for one in asked:
        if not one.ended:
            report.failures.append(f"a request sent {one.sent - begin:+.1f} s from the fault has no end")
        elif one.error:
            report.errors[one.error] += 1
            report.told_s = max(report.told_s, one.ended - max(begin, one.sent))
            if one.sent < begin and one.ended < begin:
                report.failures.append(f"an error before the fault: {one.error}")
        elif one.text != expected[one.prompt] or one.num_tokens != MAX_TOKENS:
            report.failures.append(f"an answer is wrong: {one.num_tokens} tokens, {one.text!r}")
        else:
            report.num_answers += 1


# -- what is left over -------------------------------------------------------------------------------------

# Connections that Triton has not closed yet, pools that have grown.
SLACK = {"descriptors": 12, "threads": 12}


def role(process: psutil.Process) -> str:
    """Triton, a model's stub, the engine; `ended` if nobody has asked how it did."""
    if process.status() == psutil.STATUS_ZOMBIE:
        return "ended"
    command = process.cmdline()
    if "pagetide.engine" in command:
        return "engine"
    if command and command[0].endswith("triton_python_backend_stub"):
        return Path(command[1]).parent.parent.name
    return "triton" if command and command[0].endswith("tritonserver") else " ".join(command)[:60]


def process_called(server: TritonServer, name: str) -> psutil.Process:
    return next(process for process in server.processes() if role(process) == name)


def _held(server: TritonServer) -> dict[str, Any]:
    processes, told = server.processes(), metrics(server.address)
    return {
        "processes": sorted(map(role, processes)),
        "descriptors": processes[0].num_fds(),
        "threads": processes[0].num_threads(),
        **{name: told[f"pagetide_{name}"] for name in GAUGES},
    }


def regions(server: TritonServer) -> set[Path]:
    """The shared memory of its stubs, whose command lines name it."""
    commands = (process.cmdline() for process in server.processes() if role(process) in STUBS)
    return {Path("/dev/shm", part) for command in commands for part in command if "shm_region" in part}


STUBS = ("preprocessing", "llm", "llm_unary", "postprocessing")
GAUGES = ("requests_running", "requests_waiting", "kv_blocks_used")


def _left_over(server: TritonServer, before: dict[str, Any], regions_before: set[Path]) -> list[str]:
    deadline = time.monotonic() + 60
    while True:
        now = _held(server)
        more = [
            f"{name}: {before[name]} before, {now[name]} after"
            for name in before
            if (
                now[name] > before[name] + SLACK.get(name, 0)
                if isinstance(before[name], int | float)
                else now[name] != before[name]
            )
        ]
        gone = regions_before - regions(server)
        more += [f"{region} is there, but not its stub" for region in gone if region.exists()]
        if not more or time.monotonic() > deadline:
            return more
        time.sleep(1)


# -- faults ------------------------------------------------------------------------------------------------

Cause = Callable[[TritonServer], contextlib.AbstractContextManager[None]]


@dataclass(frozen=True)
class Fault:
    """cause: the fault lasts as long as this context is entered. mounts: folders that are a file system of
    their own for it, with their sizes in MB.
    """

    name: str
    cause: Cause
    mounts: tuple[tuple[str, int], ...] = ()


def _kill(name: str, number: int = signal.SIGKILL) -> Cause:
    @contextlib.contextmanager
    def cause(server: TritonServer) -> Iterator[None]:
        process_called(server, name).send_signal(number)
        yield

    return cause


@contextlib.contextmanager
def _stop_engine(server: TritonServer) -> Iterator[None]:
    engine = process_called(server, "engine")
    engine.suspend()
    try:
        yield time.sleep(STOPPED_S)
    finally:
        engine.resume()


@contextlib.contextmanager
def _stop_server(server: TritonServer) -> Iterator[None]:
    """As stop.sh, Docker and Kubernetes do: short answers come to their end, long ones end with an error."""
    head = b"POST /v2/models/ensemble/generate_stream HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s"
    body = b'{"text_input": "x", "max_tokens": 4000, "ignore_eos": true, "stream": true}'
    with socket.create_connection((server.address.host, server.address.http_port)) as client:
        client.sendall(head % (len(body), body))
        assert client.recv(1000).startswith(b"HTTP/1.1 200"), "no answer"
        server.stop(drain_s=5)
        client.settimeout(5)
        said = b""
        with contextlib.suppress(ConnectionResetError):  # the server has ended
            while part := client.recv(65536):
                said = (said + part)[-2000:]
    if b"has not waited longer" not in said:
        raise RuntimeError(f"an answer that was cut ends with {said[-300:]!r}")
    yield


@contextlib.contextmanager
def _take_memory(server: TritonServer) -> Iterator[None]:
    """The engine gets no more than it has, and a request that needs more."""
    engine = process_called(server, "engine")
    engine.rlimit(psutil.RLIMIT_AS, (engine.memory_info().vms // 2, psutil.RLIM_INFINITY))
    connection = Connection(server.address.grpc)
    one = connection.ask("the tide and the moon " * 600, return_context_logits=True)
    connection.close()
    if not one.error:
        raise RuntimeError("there was memory for this")
    yield


@contextlib.contextmanager
def _fill(folder: Path) -> Iterator[None]:
    file = folder / "fill"
    with contextlib.suppress(OSError), file.open("wb", buffering=0) as filling:  # no space left
        while True:
            filling.write(bytes(4096))
    try:
        yield time.sleep(FULL_S)
    finally:
        file.unlink()


def _fill_shared_memory(server: TritonServer) -> contextlib.AbstractContextManager[None]:
    return _fill(Path("/dev/shm"))


@contextlib.contextmanager
def _fill_disk(server: TritonServer) -> Iterator[None]:
    """And an engine that starts meanwhile."""
    with _fill(server.folder):
        process_called(server, "engine").kill()
        yield time.sleep(FULL_S)


@contextlib.contextmanager
def _vanish(server: TritonServer) -> Iterator[None]:
    """Connections that say nothing, half a request, or a whole one, and are gone."""
    body = b'{"text_input": "x", "max_tokens": 4000, "stream": true}'
    head = f"POST /v2/models/ensemble/generate_stream HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n"
    whole = head.encode() + body
    starts = (b"", b"POST /v2/models/ens", whole[:-7], whole, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", bytes(99))
    for number in range(NUM_VANISHING):
        port = (server.address.http_port, server.address.grpc_port)[number % 2]
        with socket.create_connection((server.address.host, port), timeout=30) as client:
            client.sendall(starts[number % len(starts)])
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    yield


@contextlib.contextmanager
def _read_slowly(server: TritonServer) -> Iterator[None]:
    """A byte a second of answers that are as long as they may be."""
    body = b'{"text_input": "x", "max_tokens": 4000, "ignore_eos": true, "stream": true}'
    head = f"POST /v2/models/ensemble/generate_stream HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n"
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(socket.socket()) for _ in range(NUM_SLOW)]
        for client in clients:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            client.connect((server.address.host, server.address.http_port))
            client.sendall(head.encode() + body)
        for _ in range(SLOW_S):
            for client in clients:
                client.recv(1)
            time.sleep(1)
        yield


RUN_FOLDER = "{run}"  # of the server, in a fault's mounts
STOPPED_S = 20
FULL_S = 5
NUM_VANISHING = 1000
NUM_SLOW = 8
SLOW_S = 20

FAULTS = [
    Fault("engine killed", _kill("engine")),
    Fault("engine crashes", _kill("engine", signal.SIGSEGV)),
    Fault("engine out of memory", _take_memory),
    Fault(f"engine stopped for {STOPPED_S} s", _stop_engine),
    *(Fault(f"stub of {name} killed", _kill(name)) for name in STUBS),
    Fault("Triton killed", _kill("triton")),
    Fault("server stopped and started", _stop_server),
    Fault("full /dev/shm", _fill_shared_memory, mounts=(("/dev/shm", 160),)),
    Fault("full disk, engine killed", _fill_disk, mounts=((RUN_FOLDER, 32),)),
    Fault(f"{NUM_VANISHING} clients vanish", _vanish),
    Fault(f"{NUM_SLOW} clients read a byte a second", _read_slowly),
]


@contextlib.contextmanager
def mounted(fault: Fault, server: TritonServer) -> Iterator[None]:
    """Raises RuntimeError where this process may not mount."""
    folders = []
    try:
        for name, size_mb in fault.mounts:
            folder = server.folder if name == RUN_FOLDER else Path(name)
            folder.mkdir(parents=True, exist_ok=True)
            command = ["mount", "-t", "tmpfs", "-o", f"size={size_mb}m", "tmpfs", str(folder)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{done.stderr.strip()}; run this under `unshare --map-root-user --mount`")
            folders.append(folder)
        yield
    finally:
        for folder in folders:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="faults.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--users", type=int, default=16)
    parser.add_argument("--list", action="store_true", help="the names")
    arguments = parser.parse_args()
    known = {fault.name: fault for fault in FAULTS}
    if arguments.list:
        print("\n".join(known))
        return 0
    if unknown := set(arguments.names) - set(known):
        parser.error(f"no such fault: {', '.join(sorted(unknown))}; --list prints them")
    has_failed = False
    print("| fault | right answers | errors that clients got | told within | answers again after |")
    print("| --- | --- | --- | --- | --- |")
    for name in arguments.names or known:
        report = run(known[name], arguments.users)
        print(report.row(), flush=True)
        for failure in report.failures:
            print(f"WRONG: {name}: {failure}", file=sys.stderr, flush=True)
        has_failed |= bool(report.failures)
    return int(has_failed)


if __name__ == "__main__":
    sys.exit(main())
