"""What the scripts that start processes need: ports, parents, and whether somebody answers."""

from __future__ import annotations

import ctypes
import signal
import socket
import urllib.request
from typing import Any

import psutil


class ServerError(RuntimeError):
    """The server cannot start or stop; the message says why."""


def process_of(facts: dict[str, Any]) -> psutil.Process | None:
    """The process that was started with this `pid` at the time `started`; None if it has ended."""
    try:
        process = psutil.Process(facts["pid"])
        return process if abs(process.create_time() - facts["started"]) < 1 else None
    except psutil.NoSuchProcess:
        return None


def check_port(host: str, port: int) -> None:
    """Raises ServerError if nobody may listen there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ServerError(
                f"port {port} on {host} cannot be used ({error.strerror}); choose others, see --help"
            ) from None


def answers(url: str) -> bool:
    """True if it answers with status 200."""
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return answer.status == 200
    except OSError:
        return False


def end_with_parent() -> None:
    """In a child: end when the start script does, however it ends."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
