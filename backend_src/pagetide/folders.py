"""Folders that are made once, whichever process comes first, and kept."""

from __future__ import annotations

import fcntl
import shutil
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


@contextmanager
def _lock(target: Path) -> Iterator[None]:
    """Keeps other processes from making the same folder: a server's models start side by side."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(target.name + ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
