"""Starts and stops a Triton server on this repository's models: the container's own binary, or the one in
the nvidia-pytriton wheel.

Each server has a folder .run/PORT with its settings, its log and what is needed to stop it. Used by
serve.py, the tests and the benchmark.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "backend_src"))

import psutil
from gateway_process import stop_gateway
from pagetide.serving.client import drain
from processes import (
    ServerError,
    answers,
    check_port,
    end_with_parent,
    process_of,
    read_facts,
    write_facts,
)

ROOT = Path(__file__).resolve().parents[1]
RUN = ROOT / ".run"
REPOSITORY = ROOT / "model_repository"
DRAIN_S = 30.0  # in which answers that are under way when the server is told to stop may come to their end
ORPHANS_S = 2.0  # in which stubs and engines have seen that their server is gone, and are gone too
EXIT_TIMEOUT_S = 5  # Triton's own, after that
SETTINGS_FILE = "pagetide.json"
MIN_SHARED_MEMORY_MB = 128
RESTRICTED = ("model-repository", "shared-memory", "trace", "logging")  # Triton's names of what needs a token
TOKEN_HEADER = "admin-token"  # over gRPC `triton-grpc-protocol-admin-token`


@dataclass(frozen=True)
class Address:
    """Where a server listens."""

    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002

    @property
    def reachable_host(self) -> str:
        """Where clients on this machine find it."""
        return "127.0.0.1" if self.host in ("0.0.0.0", "::") else self.host

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it."""
        return self.host in ("localhost", "::1") or self.host.startswith("127.")

    @property
    def http(self) -> str:
        return f"{self.reachable_host}:{self.http_port}"

    @property
    def grpc(self) -> str:
        return f"{self.reachable_host}:{self.grpc_port}"

    @property
    def metrics(self) -> str:
        return f"{self.reachable_host}:{self.metrics_port}"

    @property
    def ports(self) -> tuple[int, int, int]:
        return (self.http_port, self.grpc_port, self.metrics_port)


@dataclass(frozen=True)
class ModelControl:
    """token: who loads or unloads models, or changes the log, the trace or shared memory, must send it as the
    header TOKEN_HEADER; empty: nobody must. is_explicit: models can be loaded and unloaded at all.
    """

    token: str = ""
    is_explicit: bool = True

    def options(self) -> list[str]:
        """Those of tritonserver."""
        options = ["--model-control-mode=explicit", "--load-model=*"] if self.is_explicit else []
        if self.token:
            rule = f"{','.join(RESTRICTED)}:{TOKEN_HEADER}={self.token}"
            options += [f"--http-restricted-api={rule}", f"--grpc-restricted-protocol={rule}"]
        return options


def trace_options(endpoint: str) -> list[str]:
    """Those of tritonserver, for a span of each request, step and chunk."""
    kind = "--trace-config=opentelemetry"
    return [
        "--trace-config=mode=opentelemetry",
        "--trace-config=level=TIMESTAMPS",
        "--trace-config=rate=1",
        f"{kind},url={endpoint}",
        f"{kind},resource=service.name=tritonserver",
    ]


def free_address() -> Address:
    """An address whose ports nobody uses now."""
    sockets = [socket.socket() for _ in range(3)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return Address("127.0.0.1", *ports)


class TritonServer:
    """A server that this process has started, or found in its folder."""

    def __init__(
        self,
        address: Address,
        settings: dict[str, Any],
        repository: Path = REPOSITORY,
        control: ModelControl | None = None,
        traces: str = "",
    ):
        """traces: a collector's URL for Triton's own spans (OTLP over HTTP)."""
        self.address = address
        self.folder = RUN / str(address.http_port)
        self._settings, self._repository, self._control = settings, repository, control
        self._traces = traces
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> Path:
        return self.folder / "server.log"

    @property
    def pid(self) -> int:
        facts = read_facts(self._facts)
        if facts is None:
            raise ServerError(f"no server has been started with {self.folder}")
        return int(facts["pid"])

    @property
    def _facts(self) -> Path:
        return _facts_in(self.folder)

    def start(self, ends_with_parent: bool = True) -> None:
        """Starts the server; wait_until_ready() tells when it serves.

        Raises ServerError if it cannot be started here.
        """
        self._check_machine()
        shutil.rmtree(self.folder, ignore_errors=True)
        self._make_repository()
        self._launch(*self._command(), ends_with_parent)

    @property
    def _stopping(self) -> Path:
        return self.folder / "stopping"

    @property
    def is_stopping(self) -> bool:
        """Whether somebody, in whatever process, has begun to stop it."""
        return self._stopping.exists()

    def start_again(self) -> None:
        """After it has ended by itself, with the folder as it is; the log of before is `server.log.1`."""
        self._stopping.unlink(missing_ok=True)
        time.sleep(ORPHANS_S)
        self.log.replace(self.log.with_suffix(".log.1"))
        assert self._process is not None
        self._launch(*self._launched)

    def _launch(self, command: list[str], environment: dict[str, str], ends_with_parent: bool) -> None:
        self._launched = command, environment, ends_with_parent
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the start script, which stops the server in order
                preexec_fn=end_with_parent if ends_with_parent else None,
            )
        write_facts(self._facts, self._process.pid, **asdict(self.address))

    def _check_machine(self) -> None:
        for port in self.address.ports:
            check_port(self.address.host, port)
        shared = shutil.disk_usage("/dev/shm").free / 2**20
        if shared < MIN_SHARED_MEMORY_MB:
            raise ServerError(
                f"/dev/shm has {shared:.0f} MB free, Triton's models need {MIN_SHARED_MEMORY_MB}; "
                "with Docker: --shm-size=1g"
            )

    def _make_repository(self) -> None:
        """The repository's models by link, beside the settings of this server."""
        models = self.folder / "models"
        models.mkdir(parents=True)
        for entry in self._repository.iterdir():
            # Models, and the settings of those that scripts/add_model.py has added.
            if entry.is_dir() or (entry.suffix == ".json" and entry.name != SETTINGS_FILE):
                (models / entry.name).symlink_to(entry.resolve())
        (models / SETTINGS_FILE).write_text(json.dumps(self._settings, indent=2))

    def _command(self) -> tuple[list[str], dict[str, str]]:
        address = self.address
        options = [
            f"--model-repository={self.folder / 'models'}",
            f"--http-address={address.host}",
            f"--http-port={address.http_port}",
            f"--grpc-address={address.host}",
            f"--grpc-port={address.grpc_port}",
            f"--metrics-address={address.host}",
            f"--metrics-port={address.metrics_port}",
            f"--exit-timeout-secs={EXIT_TIMEOUT_S}",
            "--disable-auto-complete-config",
            *(self._control.options() if self._control else ()),
            *(trace_options(self._traces) if self._traces else ()),
        ]
        own = shutil.which("tritonserver")
        if own:
            return [own, *options], dict(os.environ)
        binary, environment = self._from_wheel()
        return [str(binary), f"--backend-directory={self.folder / 'backends'}", *options], environment

    def _from_wheel(self) -> tuple[Path, dict[str, str]]:
        """The wheel's server, with the stub of this Python's version beside the Python backend."""
        spec = importlib.util.find_spec("pytriton")
        if spec is None or spec.origin is None:
            raise ServerError(
                "there is no tritonserver on the PATH, and the wheel nvidia-pytriton is not "
                "installed; run scripts/setup.sh"
            )
        package = Path(spec.origin).parent
        triton = package / "tritonserver"
        backend = self.folder / "backends" / "python"
        backend.mkdir(parents=True)
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        stub = triton / "python_backend_stubs" / version / "triton_python_backend_stub"
        if not stub.exists():
            raise ServerError(f"the wheel nvidia-pytriton has no stub for Python {version}")
        for file in (*(triton / "backends" / "python").glob("*.*"), stub):
            (backend / file.name).symlink_to(file)
        libraries = [
            str(package.parent / "nvidia_pytriton.libs"),
            sysconfig.get_config_var("LIBDIR") or "",
            os.environ.get("LD_LIBRARY_PATH", ""),
        ]
        environment = {
            **os.environ,
            "LD_LIBRARY_PATH": os.pathsep.join(filter(None, libraries)),
            # The stubs take the first python3 on the path, and with it this environment.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        return triton / "bin" / "tritonserver", environment

    # -- while it runs -------------------------------------------------------------------------------------

    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def is_ready(self) -> bool:
        return answers(f"http://{self.address.http}/v2/health/ready")

    def wait_until_ready(self, timeout_s: float = 600.0) -> None:
        """Raises ServerError with what the log says if the server ends or is not ready in time."""
        deadline = time.monotonic() + timeout_s
        while not self.is_ready():
            if not self.is_alive():
                raise ServerError(
                    f"Triton ended while it started: {self.failure()}\nThe whole log: {self.log}"
                )
            if "failed to load '" in self.log.read_text(errors="replace"):
                self.stop()
                raise ServerError(f"Triton could not start: {self.failure()}\nThe whole log: {self.log}")
            if time.monotonic() > deadline:
                self.stop()
                raise ServerError(f"Triton was not ready within {timeout_s:.0f} s. The log: {self.log}")
            time.sleep(0.1)

    def failure(self) -> str:
        """What the log says about a failed start."""
        lines = self.log.read_text(errors="replace").splitlines()
        told = [line for line in lines if "failed to load" in line and "Internal: " in line]
        return told[0].split("Internal: ", 1)[-1].split("\\n\\nAt:")[0] if told else "\n".join(lines[-15:])

    def processes(self) -> list[psutil.Process]:
        """The server and all that it has started."""
        try:
            server = psutil.Process(self.pid)
            return [server, *server.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def stop(self, drain_s: float = DRAIN_S) -> bool:
        """Lets the answers that are under way come to their end, drain_s seconds at most, ends the server and
        waits for it; True if it ended by itself within its time-out, False if it had to be killed.
        """
        processes = self.processes()
        if processes:
            self._stopping.touch()
            try:
                drain(processes[0].pid, drain_s)
            except OSError as error:  # it is stopped all the same
                print(f"answers that are under way may be lost: {error}", file=sys.stderr)
        stop_gateway(self.folder)
        if processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                processes[0].send_signal(signal.SIGTERM)
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(EXIT_TIMEOUT_S + 15)
        _, left = psutil.wait_procs(
            processes, timeout=5 if self._process is not None else EXIT_TIMEOUT_S + 15
        )
        for process in sorted(left, key=processes.index):  # the server first: its stubs then tidy up, and end
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
            psutil.wait_procs([process], timeout=5)
        return not left


def _facts_in(folder: Path) -> Path:
    return folder / "server.json"


def find_running(http_port: int) -> TritonServer | None:
    """The server that was started for this HTTP port and still runs."""
    facts = read_facts(_facts_in(RUN / str(http_port)))
    if facts is None or process_of(facts) is None:
        return None
    return TritonServer(
        Address(facts["host"], facts["http_port"], facts["grpc_port"], facts["metrics_port"]), {}
    )
