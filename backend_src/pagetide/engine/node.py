"""The ranks of a machine that is not the engine's: python -m pagetide.engine.node NODE SETTINGS_FILE.

They join the engine whenever it is there, and again when it has been started anew.
"""

from __future__ import annotations

import argparse
import logging
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from pagetide.config import Settings, SettingsError, read_settings
from pagetide.engine.ranks import check_nodes, start_rank

log = logging.getLogger("pagetide.node")

_LOOK_S = 0.2
_PAUSE_S = 1.0  # before ranks that have ended are started again


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m pagetide.engine.node", description=__doc__)
    parser.add_argument("node", type=int, help="number of this machine, from 1; 0 is the engine's")
    parser.add_argument("settings", type=Path, help="the engine's settings: model_repository/pagetide.json")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", stream=sys.stderr)
    try:
        settings = read_settings(options.settings)
        ranks = ranks_of(settings, options.node)
    except SettingsError as error:
        parser.error(str(error))
    signal.signal(signal.SIGTERM, _stop)
    while True:
        log.info("ranks %d to %d wait for the engine at %s", ranks[0], ranks[-1], settings.rendezvous)
        run_together([start_rank(settings, rank, settings.rendezvous) for rank in ranks])
        time.sleep(_PAUSE_S)


def ranks_of(settings: Settings, node: int) -> range:
    """The ranks of a machine. Raises SettingsError if it has none."""
    check_nodes(settings)
    num_nodes = settings.tensor_parallel_size // settings.local_size
    if not 1 <= node < num_nodes:
        raise SettingsError(
            f"node is {node}, but tensor_parallel_size and ranks_per_node make {num_nodes} nodes, of which "
            "0 is the engine's"
        )
    return range(node * settings.local_size, (node + 1) * settings.local_size)


def run_together(processes: list[subprocess.Popen[bytes]]) -> None:
    """Waits until one has ended, and ends the others: without it they can do nothing."""
    try:
        while all(process.poll() is None for process in processes):
            time.sleep(_LOOK_S)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _stop(signum: int, frame: FrameType | None) -> None:
    sys.exit(0)


if __name__ == "__main__":
    sys.exit(main())
