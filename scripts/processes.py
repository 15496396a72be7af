"""What the scripts that start processes need: ports, parents, and whether somebody answers."""

from __future__ import annotations

import ctypes
import json
import signal
import socket
import urllib.request
from pathlib import Path
from typing import Any

import psutil
from pagetide.folders import write_whole
from pagetide.serving.left_behind import start_time


class ServerError(RuntimeError):
    """The server cannot start or stop; the message says why."""


def facts_of(pid: int) -> dict[str, Any]:
    """By which process_of() finds it again: numbers are given anew, and clocks are set, but not both."""
    return {"pid": pid, "started": start_time(pid)}


def write_facts(file: Path, pid: int, **further: Any) -> None:
    """For read_facts(), in any process."""
    write_whole(file, json.dumps({**facts_of(pid), **further}))


def read_facts(file: Path) -> dict[str, Any] | None:
    """None where nothing was written."""
    try:
        return dict(json.loads(file.read_text()))
    except FileNotFoundError:
        return None


def process_of(facts: dict[str, Any]) -> psutil.Process | None:
    """The process that facts_of() has described; None if it has ended."""
    try:
        process = psutil.Process(facts["pid"])
        has_ended = start_time(facts["pid"]) != facts["started"] or process.status() == psutil.STATUS_ZOMBIE
        return None if has_ended else process
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
