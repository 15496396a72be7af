"""Folders that are made once, whichever process comes first, and kept; those of running servers, and files
that others read while they are written.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

UNFINISHED = ".unfinished"  # how the name of a folder ends while it is made


def make_once(
    target: Path, make: Callable[[Path], None], is_whole: Callable[[Path], bool] = Path.is_dir
) -> Path:
    """The folder, made if it is not there or not whole.

    make: fills an empty folder. It gets its name only when it is whole, so that a crash leaves nothing that
    looks like one. Raises OSError where it cannot be written.
    """
    if not is_whole(target):
        with _lock(target):
            if not is_whole(target):
                _make(target, make)
    return target


def _make(target: Path, make: Callable[[Path], None]) -> None:
    unfinished = target.with_name(target.name + UNFINISHED)
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir()
        make(unfinished)
        shutil.rmtree(target, ignore_errors=True)
        unfinished.rename(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_whole(file: Path, text: str) -> None:
    """Whoever reads the file meanwhile finds what was there before, or all of the text; of two who write it
    at once one wins. Raises OSError where it cannot be written.
    """
    unnamed = None
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=file.parent, prefix=f".{file.name}.", delete=False
        ) as opened:
            unnamed = Path(opened.name)
            opened.write(text)
        unnamed.rename(file)
    except OSError:
        if unnamed is not None:
            unnamed.unlink()
        raise


@contextmanager
def _lock(target: Path) -> Iterator[None]:
    """Keeps other processes from making the same folder: a server's models start side by side."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(target.name + ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def ranks_folder(pid: int) -> Path:
    """Where the ranks of the engine with this process id meet; whoever sees the engine end removes it.

    Raises PermissionError.
    """
    return private_folder() / f"ranks-{pid}"


def private_folder() -> Path:
    """Where this user's running servers have their sockets.

    Raises PermissionError if no such place is safe.
    """
    folder = Path(tempfile.gettempdir()) / f"pagetide-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    facts = folder.lstat()
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid() or facts.st_mode & 0o022:
        # Whoever can write there could put a socket of his own in the engine's place.
        raise PermissionError(
            f"{folder} must be a folder that only user {os.getuid()} can write to; remove it, or "
            "set TMPDIR to another place"
        )
    return folder
