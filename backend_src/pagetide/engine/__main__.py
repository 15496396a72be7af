"""The engine as a process of its own, which ends when its parent does: python -m pagetide.engine PARENT_PID SETTINGS_JSON ADDRESS."""

from __future__ import annotations

import os
import sys
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


def main() -> int:
    # Before anything else: what follows takes seconds, and the parent may die meanwhile.
    end_with_parent(int(sys.argv[1]))
    from pagetide.engine.process import serve

    return serve(sys.argv[2], sys.argv[3])


if __name__ == "__main__":
    sys.exit(main())
