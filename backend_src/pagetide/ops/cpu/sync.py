"""How the threads of one kernel take tasks and wait for each other, without leaving the kernel.

sync int64 [1 + phases, threads, 8], zeros at the beginning, a cache line for each thread: [0, 0, 0] counts
arrivals at barriers, [0, 0, 1] the threads that sleep at one, [0, thread, 2] is the processor's clock when
the thread began; then, for each phase and thread, [tasks taken of the thread's share, clock at the phase's
end].
"""

from __future__ import annotations

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from pagetide.ops.cpu.compiled import device_function, kernel

_LINE = 8
_SPINS = 20_000  # about 50 us; then the thread sleeps, and whoever else wants the core gets it
_ARRIVALS, _SLEEPERS, _BEGAN = 0, 1, 2  # elements of a line of sync[0]
_FUTEX, _WAIT, _WAKE, _ALL = 202, 128, 129, 2**31 - 1  # x86-64's system call, and its private operations

_sched_yield = types.ExternalFunction("sched_yield", types.int32())
_syscall = types.ExternalFunction("syscall", types.int64(*[types.int64] * 7))


@intrinsic
def _fetch_add(typing_context, array, index, value):  # type: ignore[no-untyped-def]
    """Adds to an array's element number `index` in one indivisible step and returns what was there before.

    Nothing moves across it.
    """

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
def _address(typing_context, array):  # type: ignore[no-untyped-def]
    """Where an array's memory begins."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.ptrtoint(
            context.make_array(signature.args[0])(context, builder, args[0]).data, ir.IntType(64)
        )

    return types.int64(array), generate


@intrinsic
def _clock(typing_context):  # type: ignore[no-untyped-def]
    """The processor's time stamp, in ticks."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        kind = ir.FunctionType(ir.IntType(64), [])
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.readcyclecounter"), [])

    return types.int64(), generate


@device_function
def begin(sync, thread):  # type: ignore[no-untyped-def]
    """Notes when a thread began."""
    sync[0, thread, _BEGAN] = _clock()


@device_function
def take(sync, phase, thread, num_tasks):  # type: ignore[no-untyped-def]
    """The number of a task that no other thread gets, or -1 if none is left.

    Each thread has a contiguous share, so that what it reads from memory lies in one line; when that is
    done it helps others with theirs.
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
    """Ends a phase: returns when all threads have called it as often as this one.

    The last to come is usually microseconds behind, so the others spin. Where it is not, something else has
    its core: spinning on, or only yielding, each of some hundred barriers in a step would last a time slice
    of the scheduler.
    """
    num_threads = sync.shape[1]
    arrivals = _fetch_add(sync, _ARRIVALS, 1) + 1
    goal = (arrivals + num_threads - 1) // num_threads * num_threads
    if arrivals == goal and _look(sync, _SLEEPERS) > 0:
        _syscall(_FUTEX, _address(sync), _WAKE, _ALL, 0, 0, 0)
    spins = 0
    while _look(sync, _ARRIVALS) < goal:
        spins += 1
        if spins > _SPINS:
            _fetch_add(sync, _SLEEPERS, 1)
            seen = _look(sync, _ARRIVALS)
            if seen < goal:  # the lower half of the counter is what the kernel compares
                _syscall(_FUTEX, _address(sync), _WAIT, seen & 0x7FFFFFFF, 0, 0, 0)
            _fetch_add(sync, _SLEEPERS, -1)
    sync[1 + phase, thread, 1] = _clock()


def make_sync(num_phases: int, num_threads: int) -> np.ndarray:
    """Counters for one call of a kernel, each on its own cache line: int64 [1 + phases, threads, line]."""
    return np.zeros((1 + num_phases, num_threads, _LINE), np.int64)


def phase_ticks(sync: np.ndarray) -> np.ndarray:
    """Ticks of the processor's clock that each phase took, from the end of the one before to the last
    thread's end: int64 [phases]; 0 for a phase that was left out.
    """
    ends = sync[1:, :, 1].max(1)
    ends = np.maximum.accumulate(np.concatenate([[sync[0, :, _BEGAN].min()], ends]))
    return np.diff(ends)


@device_function
def ticks():  # type: ignore[no-untyped-def]
    """The clock of phase_ticks, now."""
    return _clock()


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
    """The threads of the pool, if all really run side by side; otherwise 1, since kernels whose threads
    wait for each other would never end.
    """
    count = numba.get_num_threads()
    sync = make_sync(1, count)
    _meet(count, sync, 1_000_000)
    return count if sync[1, :, 0].all() else 1
