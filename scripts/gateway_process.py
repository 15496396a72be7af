"""Starts and stops the OpenAI gateway of a server, whose folder keeps its log and its process id."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
from processes import ServerError, answers, end_with_parent, process_of

_START_TIMEOUT_S = 60.0
_EXIT_TIMEOUT_S = 15
_PACKAGE = Path(__file__).resolve().parents[1] / "backend_src"


def start_gateway(folder: Path, host: str, port: int, triton: str, ends_with_parent: bool) -> None:
    """Returns when the gateway answers. triton: its gRPC address. Raises ServerError."""
    log_file = folder / "gateway.log"
    command = [sys.executable, "-m", "pagetide.gateway", "--host", host, "--port", str(port)]
    with log_file.open("wb") as log:
        gateway = subprocess.Popen(
            [*command, "--triton", triton],
            cwd=_PACKAGE,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=end_with_parent if ends_with_parent else None,
        )
    started = psutil.Process(gateway.pid).create_time()
    _facts(folder).write_text(json.dumps({"pid": gateway.pid, "started": started}))
    deadline = time.monotonic() + _START_TIMEOUT_S
    reachable = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    while not answers(f"http://{reachable}:{port}/metrics"):
        if gateway.poll() is not None:
            raise ServerError(f"the gateway has ended; its log: {log_file}")
        if time.monotonic() > deadline:
            raise ServerError(f"the gateway is not ready after {_START_TIMEOUT_S:.0f} s; its log: {log_file}")
        time.sleep(0.1)


def gateway_of(folder: Path) -> psutil.Process | None:
    """The gateway of the server with this folder, if it runs."""
    return process_of(json.loads(_facts(folder).read_text())) if _facts(folder).exists() else None


def stop_gateway(folder: Path) -> None:
    """Ends the gateway, if there is one."""
    gateway = gateway_of(folder)
    if gateway is not None:
        gateway.terminate()
        _, left = psutil.wait_procs([gateway], timeout=_EXIT_TIMEOUT_S)
        for process in left:
            process.kill()


def _facts(folder: Path) -> Path:
    return folder / "gateway.json"
