"""The engine as a process of its own, which ends when its parent does: python -m pagetide.engine PARENT_PID
SETTINGS_JSON ADDRESS.
"""

from __future__ import annotations

import sys

from pagetide.engine.parent import end_with_parent


def main() -> int:
    # Before anything else: what follows takes seconds, and the parent may die meanwhile.
    end_with_parent(int(sys.argv[1]))
    from pagetide.engine.process import serve

    return serve(sys.argv[2], sys.argv[3])


if __name__ == "__main__":
    sys.exit(main())
