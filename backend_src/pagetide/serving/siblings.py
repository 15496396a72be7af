"""A Triton server goes on without a stub that has died, and answers all that needs it with errors for ever.
The other stubs see to it that such a server ends, so that whoever runs it can start it again.
"""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import threading
from pathlib import Path
from typing import TextIO

from pagetide.engine.parent import end_with_parent
from pagetide.folders import private_folder
from pagetide.serving.left_behind import (
    holds,
    is_free,
    own_region,
    remove_region,
    remove_stub_file,
    start_time,
)

log = logging.getLogger("pagetide.siblings")

_LOOK_S = 1.0


class Siblings:
    """This stub among those of its server; from join() to leave() its death ends the server.

    Each holds a lock on a file of its own, which says what it has in shared memory: where a file is there and
    its lock is free, the stub has died. A stub whose server dies removes what both leave behind, and ends.
    """

    def __init__(self, name: str, server: int):
        self._server = server
        self._prefix = f"stub-{server}.{start_time(server)}-"
        self._path = private_folder() / f"{self._prefix}{name}"
        self._region = own_region()
        self._lock: TextIO | None = None
        self._is_leaving = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="pagetide-siblings", daemon=True)
        end_with_parent(server, self._tidy)

    def join(self) -> None:
        """This stub is ready: Triton asks no more whether it is alive."""
        self._lock = _hold(self._path, self._region)
        self._watcher.start()

    def _watch(self) -> None:
        while not self._is_leaving.wait(_LOOK_S):
            for path in self._path.parent.glob(f"{self._prefix}*"):
                if path != self._path and is_free(path):
                    _end_server(self._server, path)

    def _tidy(self) -> None:
        remove_region(self._region)
        self._remove_file()

    def leave(self) -> None:
        """This stub is about to end in order."""
        self._is_leaving.set()
        if self._lock is not None:
            self._watcher.join()
            self._remove_file()
            self._lock.close()

    def _remove_file(self) -> None:
        """Unless it is that of this model's next stub already."""
        if self._lock is not None and holds(self._lock, self._path):
            self._path.unlink(missing_ok=True)


def _hold(path: Path, region: str) -> TextIO:
    """The file gets its name when it is held."""
    unnamed = path.with_name(f".{path.name}")
    opened = unnamed.open("w")
    fcntl.flock(opened, fcntl.LOCK_EX)
    opened.write(region)
    opened.flush()
    unnamed.rename(path)
    return opened


def _end_server(server: int, dead: Path) -> None:
    log.error(
        "%s has died, and Triton cannot start it again: the server ends now, for whoever runs it "
        "to start it again",
        dead.name,
    )
    if os.getppid() == server:
        # In order it would wait for requests that never end. (The first process of a container dies of
        # nothing that it does not take itself.)
        os.kill(server, signal.SIGKILL if server != 1 else signal.SIGTERM)
    remove_stub_file(dead)
