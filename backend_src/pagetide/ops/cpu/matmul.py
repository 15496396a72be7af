"""Matrix products with packed weights: x [m, k] times weight [n, k] transposed, sums in float32.

Threads take groups of 32 outputs. Weights stream from memory once, as long as all rows of x fit into the
cache. Every array of rows has room for block.ROOM more than are used.

A quantized weight (codes.py) multiplies the rows of x that prepare_row or prepare_rows has rounded.
"""

from __future__ import annotations

import numpy as np

from pagetide.ops.cpu.adapters import expand
from pagetide.ops.cpu.block import SCRATCH_ROWS, multiply_block, tile_rows
from pagetide.ops.cpu.codes import encode_row, encode_rows
from pagetide.ops.cpu.compiled import by_form, device_function
from pagetide.ops.cpu.packing import GROUP
from pagetide.ops.cpu.sync import take
from pagetide.ops.cpu.tile_code import LANES
from pagetide.ops.cpu.vectors import gate_gelu, gate_silu

_TASKS_PER_THREAD = 4


@device_function
def _rows_of_block(num_rows, num_groups, num_threads, tile_rows):  # type: ignore[no-untyped-def]
    """How many rows a task has, in whole tiles: all of them, unless the groups alone are too few tasks to
    keep all threads busy.
    """
    blocks = max(1, min(_TASKS_PER_THREAD * num_threads // num_groups, num_rows // (4 * tile_rows)))
    return (num_rows + blocks * tile_rows - 1) // (blocks * tile_rows) * tile_rows


@device_function
def project(sync, phase, thread, x, rounded, num_rows, weight, layer, size, bias, adds, added, out):  # type: ignore[no-untyped-def]
    """out float32 [m, n] = x @ weight.T + bias, or += if adds.

    weight: this layer's, `size` elements along k; rounded: the rows of x for a quantized one; bias [n] or
    empty; added: what adapters add (adapters.Added), or None.

    n is a multiple of 32.
    """
    num_outputs = out.shape[1]
    num_groups = num_outputs // GROUP
    block_rows = _rows_of_block(num_rows, num_groups, sync.shape[1], tile_rows(weight))
    blocks = (num_rows + block_rows - 1) // block_rows
    task = take(sync, phase, thread, num_groups * blocks)
    while task >= 0:
        column, first = task // blocks * GROUP, task % blocks * block_rows
        last = min(first + block_rows, num_rows)
        if bias.shape[0] > 0:
            for row in range(first, last):
                for i in range(column, column + GROUP):
                    out[row, i] = bias[i] + (out[row, i] if adds else np.float32(0))
        place = first * num_outputs + column
        keeps = adds or bias.shape[0] > 0
        multiply_block(x, rounded, first, last, weight, layer, size, column, keeps, out, place, num_outputs)
        if added is not None:  # noqa: SIM102 (Numba leaves out what is inside)
            if added.adapters.active.shape[0] > 0:  # calls move all of `added`
                expand(added, rounded, first, last, column, out, place, num_outputs)
        task = take(sync, phase, thread, num_groups * blocks)


@device_function
def project_gated(  # type: ignore[no-untyped-def]
    sync, phase, thread, sums, x, rounded, num_rows, weight, layer, size, bias, added, is_gelu, out
):
    """out [m, n] = silu(gate) * up, or gelu(gate) * up (arXiv:2002.05202), in out's type.

    weight, bias, added: 16 outputs of gate and 16 of up, in turn.

    sums: float32 scratch memory for SCRATCH_ROWS * GROUP elements.
    """
    num_outputs = out.shape[1]
    num_groups = num_outputs // LANES
    block_rows = _rows_of_block(num_rows, num_groups, sync.shape[1], tile_rows(weight))
    blocks = (num_rows + block_rows - 1) // block_rows
    task = take(sync, phase, thread, num_groups * blocks)
    while task >= 0:
        group, first = task // blocks, task % blocks * block_rows
        last = min(first + block_rows, num_rows)
        for row in range(first, last, SCRATCH_ROWS):
            end = min(row + SCRATCH_ROWS, last)
            multiply_block(x, rounded, row, end, weight, layer, size, group * GROUP, False, sums, 0, GROUP)
            if added is not None:  # noqa: SIM102
                if added.adapters.active.shape[0] > 0:
                    expand(added, rounded, row, end, group * GROUP, sums, 0, GROUP)
            for r in range(end - row):
                if bias.shape[0] > 0:
                    for i in range(GROUP):
                        sums[r * GROUP + i] += bias[group * GROUP + i]
                place = (row + r) * num_outputs + group * LANES
                if is_gelu:
                    gate_gelu(sums, r * GROUP, out, place)
                else:
                    gate_silu(sums, r * GROUP, out, place)
        task = take(sync, phase, thread, num_groups * blocks)


@device_function
def _leave_row(x, row, size, weight, layer, rounded):  # type: ignore[no-untyped-def]
    """Dense matrices multiply rows as they are."""


@device_function
def _leave_rows(sync, phase, thread, x, num_rows, size, weight, layer, rounded):  # type: ignore[no-untyped-def]
    return False


# Make one row of x [m, size] ready to be multiplied by a layer's matrix, if that needs it; or all of them, as
# a phase of its own, and say whether there was anything to do.
prepare_row = by_form(3, _leave_row, encode_row)
prepare_rows = by_form(6, _leave_rows, encode_rows)
