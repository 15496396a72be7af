"""A block of a matrix product: some rows of x times 32 outputs of a packed weight, dense or quantized.

Tiles write where the result belongs, whole tiles at a time: every array of rows has room for ROOM more than
are used.
"""

from __future__ import annotations

import math

from pagetide.ops.cpu.codes import add_block
from pagetide.ops.cpu.codes_tile import CODE_ROWS
from pagetide.ops.cpu.compiled import HAS_MATRIX_TILES, by_form, device_function
from pagetide.ops.cpu.matrix_tile import MATRIX_DEPTH, MATRIX_ROWS, begin_tiles, end_tiles, matrix_tile
from pagetide.ops.cpu.packing import GROUP
from pagetide.ops.cpu.tile_code import LANES
from pagetide.ops.cpu.tiles import TILE_ROWS, multiply, multiply_add
from pagetide.ops.cpu.vectors import clear

DENSE_ROWS = MATRIX_ROWS if HAS_MATRIX_TILES else TILE_ROWS
ROOM = DENSE_ROWS - 1
# Rows that are multiplied into scratch memory at a time: whole tiles of every kind.
SCRATCH_ROWS = 96 if HAS_MATRIX_TILES else 24


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


# To quantized matrices too adapters' dense ones are added.
_CODED_ROWS = math.lcm(CODE_ROWS, DENSE_ROWS)
tile_rows = by_form(0, lambda weight: DENSE_ROWS, lambda weight: _CODED_ROWS)
multiply_block = by_form(4, _multiply_dense, _multiply_codes, _multiply_halves if HAS_MATRIX_TILES else None)
