"""Matrix products with packed weights: x [m, k] times weight [n, k] transposed, sums in float32.

Threads take groups of 32 outputs. Weights stream from memory once, as long as all rows of x fit into the
cache. Tiles write where the result
belongs, whole tiles at a time: every array of rows has room for TILE_ROWS - 1 more than are used.
"""

from __future__ import annotations

import numpy as np

from pagetide.ops.cpu.compiled import device_function
from pagetide.ops.cpu.packing import GROUP
from pagetide.ops.cpu.sync import take
from pagetide.ops.cpu.tile_code import LANES
from pagetide.ops.cpu.tiles import TILE_ROWS, multiply, multiply_add
from pagetide.ops.cpu.vectors import gate

_TASKS_PER_THREAD = 4


@device_function
def _rows_of_block(num_rows, num_groups, num_threads):  # type: ignore[no-untyped-def]
    """How many rows a task has, in whole tiles: all of them, unless the groups alone are too few tasks to
    keep all threads busy.
    """
    blocks = max(1, min(_TASKS_PER_THREAD * num_threads // num_groups, num_rows // (4 * TILE_ROWS)))
    return (num_rows + blocks * TILE_ROWS - 1) // (blocks * TILE_ROWS) * TILE_ROWS


@device_function
def project(sync, phase, thread, x, num_rows, weight, at, size, bias, adds, out):  # type: ignore[no-untyped-def]
    """out float32 [m, n] = x @ weight.T + bias, or += if adds.

    weight: packed, from element `at` on, `size` elements along k; bias [n] or empty.

    n is a multiple of 32.
    """
    num_outputs = out.shape[1]
    num_groups = num_outputs // GROUP
    block_rows = _rows_of_block(num_rows, num_groups, sync.shape[1])
    blocks = (num_rows + block_rows - 1) // block_rows
    task = take(sync, phase, thread, num_groups * blocks)
    while task >= 0:
        column, first = task // blocks * GROUP, task % blocks * block_rows
        last = min(first + block_rows, num_rows)
        if bias.shape[0] > 0:
            for row in range(first, last):
                for i in range(column, column + GROUP):
                    out[row, i] = bias[i] + (out[row, i] if adds else np.float32(0))
        for row in range(first, last, TILE_ROWS):
            w_at, out_at = at + column * size, row * num_outputs + column
            if adds or bias.shape[0] > 0:
                multiply_add(
                    last - row,
                    x,
                    row * size,
                    size,
                    weight,
                    w_at,
                    LANES * size,
                    size,
                    out,
                    out_at,
                    num_outputs,
                )
            else:
                multiply(
                    last - row,
                    x,
                    row * size,
                    size,
                    weight,
                    w_at,
                    LANES * size,
                    size,
                    out,
                    out_at,
                    num_outputs,
                )
        task = take(sync, phase, thread, num_groups * blocks)


@device_function
def project_gated(sync, phase, thread, sums, x, num_rows, weight, at, size, bias, out):  # type: ignore[no-untyped-def]
    """out [m, n] = silu(gate) * up (SwiGLU, arXiv:2002.05202), in out's type.

    weight, bias: 16 outputs of gate and 16 of up, in turn.

    sums: float32 scratch memory for TILE_ROWS * GROUP elements.
    """
    num_outputs = out.shape[1]
    num_groups = num_outputs // LANES
    block_rows = _rows_of_block(num_rows, num_groups, sync.shape[1])
    blocks = (num_rows + block_rows - 1) // block_rows
    task = take(sync, phase, thread, num_groups * blocks)
    while task >= 0:
        group, first = task // blocks, task % blocks * block_rows
        last = min(first + block_rows, num_rows)
        for row in range(first, last, TILE_ROWS):
            multiply(
                last - row,
                x,
                row * size,
                size,
                weight,
                at + group * GROUP * size,
                LANES * size,
                size,
                sums,
                0,
                GROUP,
            )
            for r in range(min(TILE_ROWS, last - row)):
                if bias.shape[0] > 0:
                    for i in range(GROUP):
                        sums[r * GROUP + i] += bias[group * GROUP + i]
                gate(sums, r * GROUP, out, (row + r) * num_outputs + group * LANES)
        task = take(sync, phase, thread, num_groups * blocks)
