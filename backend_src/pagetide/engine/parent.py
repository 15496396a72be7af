"""Lets a process end with the one above it, whatever it is doing then: a server that dies must leave
neither a stub nor an engine behind.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pagetide

_LOOK_S = 0.5


def environment_of_children() -> dict[str, str]:
    """This process's environment, for Python processes that are to import the same pagetide."""
    source = str(Path(pagetide.__file__).parents[1])
    path = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path}


def end_with_parent(parent: int, tidy: Callable[[], None] = lambda: None) -> None:
    """Ends this process when `parent` is not, or is no longer, the process above it; calls tidy() before."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_S)
        try:
            tidy()
        finally:
            os._exit(1)

    threading.Thread(target=watch, name="pagetide-parent", daemon=True).start()
