"""Matrix product for few rows: x float32 [m, k] times weight [n, k] (float32 or bfloat16) transposed, sums in float32.

Weights stream from memory once; a tile of 2 weight rows x 4 tokens is summed in registers.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from pagetide.ops.cpu.compiled import device_function, kernel, load

_ROWS = 16  # weight rows that a thread takes at a time


@kernel
def matmul(x, weight, out):  # type: ignore[no-untyped-def]
    """out float32 [m, n] = x @ weight.T."""
    m, k = x.shape
    n = weight.shape[0]
    for tile in prange((n + _ROWS - 1) // _ROWS):
        first, last = tile * _ROWS, min(tile * _ROWS + _ROWS, n)
        token = 0
        while token + 4 <= m:
            for row in range(first, last - 1, 2):
                _tile_2x4(x, weight, out, token, row, k)
            if (last - first) % 2:
                for i in range(4):
                    out[token + i, last - 1] = _dot(x[token + i], weight[last - 1], k)
            token += 4
        while token < m:
            for row in range(first, last - 3, 4):
                _tile_4x1(x, weight, out, token, row, k)
            for row in range(last - (last - first) % 4, last):
                out[token, row] = _dot(x[token], weight[row], k)
            token += 1


@device_function
def _dot(x, w, k):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for i in range(k):
        total += x[i] * load(w[i])
    return total


@device_function
def _tile_4x1(x, weight, out, token, row, k):  # type: ignore[no-untyped-def]
    x0 = x[token]
    w0, w1, w2, w3 = weight[row], weight[row + 1], weight[row + 2], weight[row + 3]
    a = b = c = d = np.float32(0)
    for i in range(k):
        xi = x0[i]
        a += xi * load(w0[i])
        b += xi * load(w1[i])
        c += xi * load(w2[i])
        d += xi * load(w3[i])
    out[token, row] = a
    out[token, row + 1] = b
    out[token, row + 2] = c
    out[token, row + 3] = d


@device_function
def _tile_2x4(x, weight, out, token, row, k):  # type: ignore[no-untyped-def]
    x0, x1, x2, x3 = x[token], x[token + 1], x[token + 2], x[token + 3]
    w0, w1 = weight[row], weight[row + 1]
    a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = np.float32(0)
    for i in range(k):
        p, q = load(w0[i]), load(w1[i])
        y0, y1, y2, y3 = x0[i], x1[i], x2[i], x3[i]
        a0 += p * y0
        a1 += p * y1
        a2 += p * y2
        a3 += p * y3
        b0 += q * y0
        b1 += q * y1
        b2 += q * y2
        b3 += q * y3
    out[token, row], out[token, row + 1] = a0, b0
    out[token + 1, row], out[token + 1, row + 1] = a1, b1
    out[token + 2, row], out[token + 2, row + 1] = a2, b2
    out[token + 3, row], out[token + 3, row + 1] = a3, b3
