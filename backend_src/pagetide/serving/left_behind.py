"""What processes that were killed could not remove: files of theirs among this user's, and Triton's shared
memory.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import time
from pathlib import Path
from typing import TextIO

from pagetide.folders import private_folder

_SHARED_MEMORY = Path("/dev/shm")
_REGION_PREFIX = "triton_python_backend_shm_region"
_NAME = re.compile(r"(engine|stub|ranks)-(\d+)(?:\.(\d+))?")
_LONG_S = 3600  # so long no start takes


def remove_left_behind() -> None:
    """Of all servers of this user that are gone, and whose locks nobody holds; what has no lock only if
    nothing has been written there for an hour.
    """
    for path in private_folder().iterdir():
        found = _NAME.match(path.name)
        if found is None or _is_alive(int(found[2]), found[3]):
            continue
        with contextlib.suppress(FileNotFoundError):  # it removes itself just now
            if found[1] == "stub" and is_free(path):
                remove_stub_file(path)
            elif path.suffix == ".lock" and is_free(path):
                for suffix in (".sock", ".failed", ".passed", ".lock"):
                    path.with_suffix(suffix).unlink(missing_ok=True)
            elif (found[1] == "ranks" or _is_alone(path)) and time.time() - path.stat().st_mtime > _LONG_S:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _is_alive(pid: int, started: str | None) -> bool:
    """started: as start_time() says it, where the name has it; process ids come again."""
    return started == start_time(pid) if started else Path("/proc", str(pid)).exists()


def _is_alone(path: Path) -> bool:
    """Whether it tells of an engine that could not start, whose owner has gone."""
    return path.suffix == ".failed" and not path.with_suffix(".lock").exists()


def start_time(pid: int) -> str:
    """Of a process, in ticks since the machine started (proc_pid_stat(5)); empty if it is gone."""
    try:
        return Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[19]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def holds(lock: TextIO, path: Path) -> bool:
    """Whether this open file is the one that has this name."""
    try:
        return os.path.samestat(os.fstat(lock.fileno()), path.stat())
    except FileNotFoundError:
        return False


def is_free(path: Path) -> bool:
    """Whether nobody holds the lock on this file, though it is there."""
    try:
        with path.open() as opened:
            fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return holds(opened, path)
    except (FileNotFoundError, BlockingIOError):
        return False


def remove_stub_file(path: Path) -> None:
    """And the shared memory that it names."""
    with contextlib.suppress(FileNotFoundError):
        remove_region(path.read_text())
        path.unlink()


def remove_region(name: str) -> None:
    """Of a stub's shared memory."""
    if name.startswith(_REGION_PREFIX) and "/" not in name:
        (_SHARED_MEMORY / name).unlink(missing_ok=True)


def own_region() -> str:
    """The name of this stub's, as Triton has given it on the command line; empty if this is no stub."""
    arguments = Path("/proc/self/cmdline").read_bytes().decode(errors="replace").split("\0")
    return next((one.lstrip("/") for one in arguments if _REGION_PREFIX in one), "")
