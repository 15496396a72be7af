"""Lets a process end with the one above it, whatever it is doing then: a server that dies must leave
neither a stub nor an engine behind.
"""

from __future__ import annotations

import os
import threading
import time

_LOOK_S = 0.5


def end_with_parent(parent: int) -> None:
    """Ends this process when `parent` is not, or is no longer, the process above it."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_S)
        os._exit(1)

    threading.Thread(target=watch, name="pagetide-parent", daemon=True).start()
