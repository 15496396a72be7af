"""One thread of each OpenMP pool for each core, held there.

Left to itself, the kernel moves the threads of a pool together onto one core whenever they pause, and a
parallel region of 1 us takes 50 us. torch and Numba share a pool where they can (see pagetide/__init__.py);
otherwise there are two, of which one works at a time.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable
from pathlib import Path

import numba
import numpy as np
import torch

from pagetide.ops.cpu.compiled import kernel


@kernel
def _touch(counts):  # type: ignore[no-untyped-def]
    for i in numba.prange(counts.shape[0]):
        counts[i] += 1


def open_pools(num_threads: int, share: tuple[int, int] = (0, 1)) -> None:
    """Opens the calling thread's pools with num_threads threads (0: one for each core that this process may
    use), or with this process's share of them and of the cores: (number, of how many).

    Each thread is held on a core of its own, where the pool has a thread for every core of the machine:
    elsewhere another process (another server, the neighbours of a container) may be on the cores that would
    be chosen here, while others are idle.
    """
    cores = sorted(os.sched_getaffinity(0))
    number, size = share
    count = max(1, min(num_threads or num_usable_cores(), len(cores)) // size)
    owns_all = count * size == len(cores) == os.cpu_count()
    cores = cores[number * count :][:count] if owns_all else cores
    for open_pool in (_open_numba_pool, _open_torch_pool):
        made = _threads_made_by(lambda: open_pool(count))  # noqa: B023 (called at once)
        for core, thread in zip(cores[1:], made if owns_all else (), strict=False):
            os.sched_setaffinity(thread, {core})
    if owns_all:
        os.sched_setaffinity(0, {cores[0]})


def num_usable_cores(cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """The cores that this process may use: those of its affinity, and no more than its control group's
    quota pays for (docker --cpus).
    """
    cores = len(os.sched_getaffinity(0))
    quota = _quota(cgroups)
    return cores if quota is None else max(1, min(cores, int(quota)))


def _quota(cgroups: Path) -> float | None:
    """Cores, None for no limit: of version 2 of control groups, and of version 1."""
    try:
        if (cgroups / "cpu.max").exists():
            quota, period = (cgroups / "cpu.max").read_text().split()
        else:
            quota, period = (
                (cgroups / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period")
            )
        return int(quota) / int(period) if quota != "max" and int(quota) > 0 else None
    except (OSError, ValueError):
        return None


def _threads_made_by(action: Callable[[], object]) -> list[int]:
    tasks = Path("/proc/self/task")
    before = set(tasks.iterdir())
    action()
    return sorted(int(thread.name) for thread in set(tasks.iterdir()) - before)


def _open_numba_pool(count: int) -> None:
    numba.set_num_threads(count)  # makes the threads already
    _touch(np.zeros(1024, np.int64))
    # Numba allows regions inside regions, and torch's attention would then open a pool in each thread of
    # its pool, a hundred times slower.
    with contextlib.suppress(OSError):
        ctypes.CDLL("libgomp.so.1.0.0").omp_set_max_active_levels(1)


def _open_torch_pool(count: int) -> None:
    torch.set_num_threads(count)
    torch.ones(2**20).add_(1)
