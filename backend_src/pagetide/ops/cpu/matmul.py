"""Matrix products with packed weights: x [m, k] times weight [n, k] transposed, sums in float32.

Threads take groups of 32 outputs. Weights stream from memory once, as long as all rows of x fit into the
cache. Tiles write where the result belongs, whole tiles at a time: every array of rows has room for
ROOM more than are used.

A quantized weight (codes.py) multiplies the rows of x that prepare_row or prepare_rows has rounded.
"""

from __future__ import annotations

import numpy as np

from pagetide.ops.cpu.codes import add_block, encode_row, encode_rows
from pagetide.ops.cpu.codes_tile import CODE_ROWS
from pagetide.ops.cpu.compiled import HAS_MATRIX_TILES, by_form, device_function
from pagetide.ops.cpu.matrix_tile import MATRIX_DEPTH, MATRIX_ROWS, begin_tiles, end_tiles, matrix_tile
from pagetide.ops.cpu.packing import GROUP
from pagetide.ops.cpu.sync import take
from pagetide.ops.cpu.tile_code import LANES
from pagetide.ops.cpu.tiles import TILE_ROWS, multiply, multiply_add
from pagetide.ops.cpu.vectors import clear, gate_gelu, gate_silu

_TASKS_PER_THREAD = 4
# Rows that are multiplied before they are gated: whole tiles of every kind.
GATED_ROWS = 96 if HAS_MATRIX_TILES else 24
DENSE_ROWS = MATRIX_ROWS if HAS_MATRIX_TILES else TILE_ROWS
ROOM = DENSE_ROWS - 1


@device_function
def _rows_of_block(num_rows, num_groups, num_threads, tile_rows):  # type: ignore[no-untyped-def]
    """How many rows a task has, in whole tiles: all of them, unless the groups alone are too few tasks to
    keep all threads busy.
    """
    blocks = max(1, min(_TASKS_PER_THREAD * num_threads // num_groups, num_rows // (4 * tile_rows)))
    return (num_rows + blocks * tile_rows - 1) // (blocks * tile_rows) * tile_rows


@device_function
def project(sync, phase, thread, x, rounded, num_rows, weight, layer, size, bias, adds, out):  # type: ignore[no-untyped-def]
    """out float32 [m, n] = x @ weight.T + bias, or += if adds.

    weight: this layer's, `size` elements along k; rounded: the rows of x for a quantized one; bias [n] or
    empty.

    n is a multiple of 32.
    """
    num_outputs = out.shape[1]
    num_groups = num_outputs // GROUP
    block_rows = _rows_of_block(num_rows, num_groups, sync.shape[1], _tile_rows(weight))
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
        _multiply_block(x, rounded, first, last, weight, layer, size, column, keeps, out, place, num_outputs)
        task = take(sync, phase, thread, num_groups * blocks)


@device_function
def project_gated(sync, phase, thread, sums, x, rounded, num_rows, weight, layer, size, bias, is_gelu, out):  # type: ignore[no-untyped-def]
    """out [m, n] = silu(gate) * up, or gelu(gate) * up (arXiv:2002.05202), in out's type.

    weight, bias: 16 outputs of gate and 16 of up, in turn.

    sums: float32 scratch memory for GATED_ROWS * GROUP elements.
    """
    num_outputs = out.shape[1]
    num_groups = num_outputs // LANES
    block_rows = _rows_of_block(num_rows, num_groups, sync.shape[1], _tile_rows(weight))
    blocks = (num_rows + block_rows - 1) // block_rows
    task = take(sync, phase, thread, num_groups * blocks)
    while task >= 0:
        group, first = task // blocks, task % blocks * block_rows
        last = min(first + block_rows, num_rows)
        for row in range(first, last, GATED_ROWS):
            end = min(row + GATED_ROWS, last)
            _multiply_block(x, rounded, row, end, weight, layer, size, group * GROUP, False, sums, 0, GROUP)
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
def _multiply_dense(x, rounded, first, last, weight, layer, size, column, keeps, out, out_at, out_stride):  # type: ignore[no-untyped-def]
    """out [rows, 32] = rows [first, last) of x @ weight[column : column + 32].T, or += if keeps; out_at:
    where out's first row begins.
    """
    w_at = layer * weight.data.shape[1] + column * size
    for row in range(first, last, TILE_ROWS):
        place = out_at + (row - first) * out_stride
        if keeps:
            multiply_add(
                last - row, x, row * size, size, weight.data, w_at, LANES * size, size, out, place, out_stride
            )
        else:
            multiply(
                last - row, x, row * size, size, weight.data, w_at, LANES * size, size, out, place, out_stride
            )


@device_function
def _multiply_halves(x, rounded, first, last, weight, layer, size, column, keeps, out, out_at, out_stride):  # type: ignore[no-untyped-def]
    """The same with the processor's matrix tiles, as far as they go into a row."""
    if size % MATRIX_DEPTH != 0:
        _multiply_dense(x, rounded, first, last, weight, layer, size, column, keeps, out, out_at, out_stride)
        return
    data, w_at, apart = weight.data, layer * weight.data.shape[1] + column * size, LANES * size
    begin_tiles(last - first, MATRIX_DEPTH)
    for row in range(first, last, MATRIX_ROWS):
        at, to = row * size, out_at + (row - first) * out_stride
        is_one = last - row <= LANES
        if keeps and is_one:
            matrix_tile(1, True, True, x, at, size, data, w_at, apart, size, out, to, out_stride)
        elif keeps:
            matrix_tile(2, True, True, x, at, size, data, w_at, apart, size, out, to, out_stride)
        elif is_one:
            matrix_tile(1, False, True, x, at, size, data, w_at, apart, size, out, to, out_stride)
        else:
            matrix_tile(2, False, True, x, at, size, data, w_at, apart, size, out, to, out_stride)
    end_tiles()


@device_function
def _multiply_codes(x, rounded, first, last, weight, layer, size, column, keeps, out, out_at, out_stride):  # type: ignore[no-untyped-def]
    """The same of a quantized matrix."""
    if not keeps:
        for row in range(last - first):
            clear(out, out_at + row * out_stride, GROUP)
    add_block(rounded, first, last, weight, layer, size, column, out, out_at, out_stride)


@device_function
def _leave_row(x, row, size, weight, layer, rounded):  # type: ignore[no-untyped-def]
    """Dense matrices multiply rows as they are."""


@device_function
def _leave_rows(sync, phase, thread, x, num_rows, size, weight, layer, rounded):  # type: ignore[no-untyped-def]
    return False


_tile_rows = by_form(0, lambda weight: DENSE_ROWS, lambda weight: CODE_ROWS)
_multiply_block = by_form(4, _multiply_dense, _multiply_codes, _multiply_halves if HAS_MATRIX_TILES else None)
# Make one row of x [m, size] ready to be multiplied by a layer's matrix, if that needs it; or all of them, as
# a phase of its own, and say whether there was anything to do.
prepare_row = by_form(3, _leave_row, encode_row)
prepare_rows = by_form(6, _leave_rows, encode_rows)
