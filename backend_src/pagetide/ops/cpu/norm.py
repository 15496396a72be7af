"""RMS norm of rows (arXiv:1910.07467), computed in float32."""

from __future__ import annotations

import numpy as np

from pagetide.ops.cpu.compiled import device_function
from pagetide.ops.cpu.matmul import prepare_row
from pagetide.ops.cpu.sync import take
from pagetide.ops.cpu.vectors import scale_by, sum_of_squares

_ROWS = 4  # of a task


@device_function
def inverse_norm(rows, at, size, eps):  # type: ignore[no-untyped-def]
    """1 / sqrt(mean of squares + eps) of the `size` elements from rows' number `at` on; rows float32."""
    return np.float32(1) / np.sqrt(sum_of_squares(rows, at, size) / np.float32(size) + eps)


@device_function
def normalize(sync, phase, thread, rows, num_rows, weight, eps, out, matrix, layer, rounded):  # type: ignore[no-untyped-def]
    """out [m, size], in its own type, = the norms of rows float32 [m, size], times weight [size], a
    multiple of 16; ready for a product with this layer's matrix (matmul.prepare_row).
    """
    size = weight.shape[0]
    num_tasks = (num_rows + _ROWS - 1) // _ROWS
    task = take(sync, phase, thread, num_tasks)
    while task >= 0:
        for row in range(task * _ROWS, min(task * _ROWS + _ROWS, num_rows)):
            scale = inverse_norm(rows, row * size, size, eps)
            scale_by(rows, row * size, weight, scale, size, out, row * size)
            prepare_row(out, row, size, matrix, layer, rounded)
        task = take(sync, phase, thread, num_tasks)


@device_function
def add_normalized(sync, phase, thread, rows, num_rows, weight, eps, residual):  # type: ignore[no-untyped-def]
    """residual float32 [m, size] += the norms of rows float32 [m, size], times weight, which take rows'
    place.
    """
    size = weight.shape[0]
    num_tasks = (num_rows + _ROWS - 1) // _ROWS
    task = take(sync, phase, thread, num_tasks)
    while task >= 0:
        for row in range(task * _ROWS, min(task * _ROWS + _ROWS, num_rows)):
            scale = inverse_norm(rows, row * size, size, eps)
            scale_by(rows, row * size, weight, scale, size, rows, row * size)
            for i in range(size):
                residual[row, i] += rows[row, i]
        task = take(sync, phase, thread, num_tasks)
