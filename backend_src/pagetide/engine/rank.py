"""A rank other than 0 as a process of its own, which ends when its parent does.

python -m pagetide.engine.rank PARENT_PID SETTINGS_JSON RANK ADDRESS
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
import traceback
from typing import Any

from pagetide.engine.parent import end_with_parent

_LOOK_S = 5


def main() -> int:
    # Before anything else: what follows takes seconds, and the parent may die meanwhile.
    end_with_parent(int(sys.argv[1]))
    run(sys.argv[2], int(sys.argv[3]), sys.argv[4])
    return 0


def run(settings_json: str, rank: int, address: str) -> None:
    """Serves rank 0 until that closes. Where that fails, the reason is left where the ranks meet, and the
    process ends.
    """
    import msgspec

    from pagetide.config import Settings
    from pagetide.engine.assemble import Model, load_rank
    from pagetide.engine.ranks import FAILURE, SETTINGS, joined_key, make_comm, open_store
    from pagetide.runner.device import select_device
    from pagetide.runner.ranks import follow

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", stream=sys.stderr)
    # Ctrl-C in a terminal reaches the whole group: rank 0 decides when this one ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    own = msgspec.json.decode(settings_json, type=Settings)
    store = open_store(own, address, rank)
    try:
        # Whatever this machine's file says: ranks must agree. Where things lie may differ.
        settings = msgspec.structs.replace(
            msgspec.json.decode(store.get(SETTINGS), type=Settings),
            **{name: getattr(own, name) for name in ("model", "cache_dir", "rendezvous")},
        )
        if settings.rendezvous:
            end_with_store(store, SETTINGS)
        model = Model.find(settings)
        device = select_device(settings, rank)
        store.set(joined_key(rank), "")
        comm = make_comm(settings, device, store, rank)
        follow(load_rank(settings, model, device, comm).runner, comm)
    except Exception as error:
        with contextlib.suppress(RuntimeError):  # rank 0, whose store it may be, has ended
            reason = f"rank {rank}: {type(error).__name__}: {error}".replace("\n", " ")
            store.compare_set(FAILURE, "", reason)
        traceback.print_exc()
        sys.stderr.flush()
        # At once: a device that waits for other ranks would hold a process that ends in order.
        os._exit(1)


def end_with_store(store: Any, key: str) -> None:
    """Ends this process when rank 0's machine, which may have lost its power, no longer has the store, in
    which there is this key.
    """

    def watch() -> None:
        try:
            while store.check([key]):
                time.sleep(_LOOK_S)
        finally:
            os._exit(1)

    threading.Thread(target=watch, name="pagetide-store", daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
