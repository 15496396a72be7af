"""Starts and stops the OpenAI gateway of a server, whose folder keeps its log and its process id."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from processes import ServerError, answers, end_with_parent, process_of, read_facts, write_facts

if TYPE_CHECKING:  # which imports this module
    from triton_server import Address

_START_TIMEOUT_S = 60.0
_EXIT_TIMEOUT_S = 15
_PACKAGE = Path(__file__).resolve().parents[1] / "backend_src"


def start_gateway(
    folder: Path, triton: Address, port: int, ends_with_parent: bool, options: Sequence[str] = ()
) -> None:
    """Returns when the gateway answers, which listens where Triton does. options: further ones of its own.

    Raises ServerError.
    """
    log_file = folder / "gateway.log"
    command = [sys.executable, "-m", "pagetide.gateway", "--host", triton.host, "--port", str(port)]
    with log_file.open("wb") as log:
        gateway = subprocess.Popen(
            [*command, "--triton", triton.grpc, "--metrics", triton.metrics, *options],
            cwd=_PACKAGE,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=end_with_parent if ends_with_parent else None,
        )
    write_facts(_facts(folder), gateway.pid)
    deadline = time.monotonic() + _START_TIMEOUT_S
    while not answers(f"http://{triton.reachable_host}:{port}/metrics"):
        if gateway.poll() is not None:
            raise ServerError(f"the gateway has ended; its log: {log_file}")
        if time.monotonic() > deadline:
            raise ServerError(f"the gateway is not ready after {_START_TIMEOUT_S:.0f} s; its log: {log_file}")
        time.sleep(0.1)


def gateway_of(folder: Path) -> psutil.Process | None:
    """The gateway of the server with this folder, if it runs."""
    facts = read_facts(_facts(folder))
    return process_of(facts) if facts else None


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
