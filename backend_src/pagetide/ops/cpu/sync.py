"""How the threads of one kernel take tasks and wait for each other, without leaving the kernel.

sync int64 [1 + phases, threads, 8], zeros at the beginning, a cache line for each thread: [0, 0, 0] counts arrivals at barriers; then, for each
phase and thread, [tasks taken of the thread's share, processor's clock at the phase's end].
"""

from __future__ import annotations

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from pagetide.ops.cpu.compiled import device_function, kernel

_LINE = 8
_SPINS = 4096  # before the core is offered to whoever else wants it

_sched_yield = types.ExternalFunction("sched_yield", types.int32())


@intrinsic
def _fetch_add(typing_context, array, index, value):  # type: ignore[no-untyped-def]
    """Adds to an array's element number `index` in one indivisible step and returns what was there before. Nothing moves across it."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.atomic_rmw("add", builder.gep(data, [args[1]]), args[2], "seq_cst")

    return types.int64(array, types.int64, types.int64), generate


@intrinsic
def _look(typing_context, array, index):  # type: ignore[no-untyped-def]
    """An array's element number `index` as other threads have left it."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.load_atomic(builder.gep(data, [args[1]]), "seq_cst", 8)

    return types.int64(array, types.int64), generate


@intrinsic
def _clock(typing_context):  # type: ignore[no-untyped-def]
    """The processor's time stamp, in ticks."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        kind = ir.FunctionType(ir.IntType(64), [])
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.readcyclecounter"), [])

    return types.int64(), generate


@device_function
def take(sync, phase, thread, num_tasks):  # type: ignore[no-untyped-def]
    """The number of a task that no other thread gets, or -1 if none is left.

    Each thread has a contiguous share, so that what it reads from memory lies in one line; when that is done it helps others with theirs.
    """
    num_threads = sync.shape[1]
    for helped in range(num_threads):
        owner = (thread + helped) % num_threads
        first, last = num_tasks * owner // num_threads, num_tasks * (owner + 1) // num_threads
        task = first + _fetch_add(sync, ((1 + phase) * num_threads + owner) * _LINE, 1)
        if task < last:
            return task
    return -1


@device_function
def finish(sync, phase, thread):  # type: ignore[no-untyped-def]
    """Ends a phase: returns when all threads have called it as often as this one."""
    num_threads = sync.shape[1]
    arrivals = _fetch_add(sync, 0, 1) + 1
    goal = (arrivals + num_threads - 1) // num_threads * num_threads
    spins = 0
    while _look(sync, 0) < goal:
        spins += 1
        if spins % _SPINS == 0:
            _sched_yield()
    sync[1 + phase, thread, 1] = _clock()


def make_sync(num_phases: int, num_threads: int) -> np.ndarray:
    return np.zeros((1 + num_phases, num_threads, _LINE), np.int64)


@kernel
def _meet(num_threads, sync, patience):  # type: ignore[no-untyped-def]
    for thread in numba.prange(num_threads):
        _fetch_add(sync, 0, 1)
        spins = 0
        while _look(sync, 0) < num_threads and spins < patience:
            spins += 1
            _sched_yield()
        sync[1, thread, 0] = _look(sync, 0) >= num_threads


def num_concurrent_threads() -> int:
    """The threads of the pool, if all really run side by side; otherwise 1, since kernels whose threads wait for each other would never end."""
    count = numba.get_num_threads()
    sync = make_sync(1, count)
    _meet(count, sync, 1_000_000)
    return count if sync[1, :, 0].all() else 1
