"""Quantized matrices on a CPU: how they are packed, and how rows of activations are rounded to be multiplied
by them: each group of inputs has a scale of its own, and integers of 8 bits (as in llama.cpp), or of 16 bits
in two digits.

A packed matrix is bytes: for 32 outputs at a time, for each group of inputs, a record of 16 outputs and one
of the next 16: [16 scales, 16 minima, codes], scales and minima bfloat16.

   8 bits    no minima; codes [group / 4, 16, 4]
   4 bits    codes [group / 8, 16, 4], the lower half of a byte is element 8 i + j, the upper 8 i + 4 + j
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numba import prange

from pagetide.ops.cpu.codes_tile import (
    CODE_ROWS,
    PANELS,
    SCALE_BYTES,
    STEP_BYTES,
    WIDE_ROWS,
    steps_of,
    tile_of_codes,
)
from pagetide.ops.cpu.compiled import device_function, kernel
from pagetide.ops.cpu.encoding import encode_group, float_of_half
from pagetide.ops.cpu.packing import GROUP, Packed
from pagetide.ops.cpu.sync import take
from pagetide.ops.cpu.tile_code import LANES
from pagetide.ops.weights import GROUPS, QuantizedWeight

_ENCODED_ROWS = 4  # of a task
_START, _BITS, _INPUTS, IS_HALF, _DIGITS = range(5)  # columns of Packed.forms


class Encoded(NamedTuple):
    """Rows of activations as integers."""

    codes: np.ndarray  # int8 [rows * digits * size]
    scales: np.ndarray  # float32 [rows * groups * 2]: scale, and what the matrix's minima need


def make_rounded(rows: int, size: int) -> Encoded:
    """Room for so many rows of any groups."""
    return Encoded(
        np.zeros(rows * 2 * size, np.int8), np.zeros(rows * -(-size // GROUPS[-1]) * 2, np.float32)
    )


def pack_codes(weight: QuantizedWeight) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of one matrix (uint8), and its row of Packed.forms, of which the first byte is 0."""
    is_half = weight.dtype is torch.bfloat16
    form = (0, weight.bits, weight.group, is_half, weight.activation_bits // 8)
    return _packed(weight).numpy(), np.array(form, np.int64)


def join_codes(matrices: list[tuple[np.ndarray, np.ndarray]]) -> Packed:
    """Those of all layers as one; empties the list, so that hardly anything is in memory twice."""
    starts = np.cumsum([0, *(len(data) for data, _ in matrices)])
    forms = np.stack([form for _, form in matrices])
    forms[:, _START] = starts[:-1]
    joined = np.empty(starts[-1], np.uint8)
    for end in starts[:0:-1]:
        data, _ = matrices.pop()
        joined[end - len(data) : end] = data
    return Packed(joined, forms)


def _packed(weight: QuantizedWeight) -> torch.Tensor:
    """uint8, flat."""

    def in_panels(values: torch.Tensor) -> torch.Tensor:
        """[n, k] to [n / 32, groups, 2, 16, elements of a group]"""
        filled = F.pad(values, (0, 0, 0, -len(values) % GROUP))
        return (
            filled.unflatten(1, (weight.scales.shape[1], -1))
            .unflatten(0, (-1, PANELS, LANES))
            .permute(0, 3, 1, 2, 4)
        )

    codes = in_panels(weight.codes).unflatten(4, (-1, steps_of(weight.bits))).transpose(3, 4)
    if weight.bits == 4:
        codes = codes[..., :4] | codes[..., 4:] << 4
    halves = [weight.scales] if weight.bits == 8 else [weight.scales, weight.minima]
    header = torch.stack([in_panels(half)[..., 0] for half in halves], 3).bfloat16()
    return torch.cat([header.contiguous().view(torch.uint8).flatten(3), codes.flatten(3)], 3).flatten()


@device_function
def record_bytes(bits, group):  # type: ignore[no-untyped-def]
    """Of 16 outputs and a group of inputs."""
    return (SCALE_BYTES if bits == 8 else 2 * SCALE_BYTES) + group * bits // 32 * STEP_BYTES


@device_function
def encode_row(x, row, size, weight, layer, encoded):  # type: ignore[no-untyped-def]
    """Rounds row `row` of x [m, size], for a product with this layer's matrix."""
    bits, group = weight.forms[layer, _BITS], weight.forms[layer, _INPUTS]
    groups = size // group
    digits = weight.forms[layer, _DIGITS]
    for g in range(groups):
        at = row * digits * size + g * group
        upper_at = at + size if digits == 2 else -1
        encode_group(
            x,
            row * size + g * group,
            group,
            bits == 8,
            encoded.codes,
            at,
            upper_at,
            encoded.scales,
            (row * groups + g) * 2,
        )


@device_function
def encode_rows(sync, phase, thread, x, num_rows, size, weight, layer, encoded):  # type: ignore[no-untyped-def]
    """All rows, a few in each task; returns True: there was something to do."""
    num_tasks = (num_rows + _ENCODED_ROWS - 1) // _ENCODED_ROWS
    task = take(sync, phase, thread, num_tasks)
    while task >= 0:
        for row in range(task * _ENCODED_ROWS, min(task * _ENCODED_ROWS + _ENCODED_ROWS, num_rows)):
            encode_row(x, row, size, weight, layer, encoded)
        task = take(sync, phase, thread, num_tasks)
    return True


@device_function
def add_block(encoded, first, last, weight, layer, size, column, out, out_at, out_stride):  # type: ignore[no-untyped-def]
    """out [rows, 32] += encoded rows [first, last) @ weight[column : column + 32].T; out_at: where out's
    first row begins. Whole tiles are read and written.
    """
    bits, group = weight.forms[layer, _BITS], weight.forms[layer, _INPUTS]
    groups = size // group
    block = PANELS * groups * record_bytes(bits, group)
    w_at = weight.forms[layer, _START] + column // GROUP * block
    digits = weight.forms[layer, _DIGITS]
    rows = CODE_ROWS if digits == 1 else WIDE_ROWS
    for row in range(first, last, rows):
        tile_of_codes(
            min(last - row, rows),
            bits,
            digits,
            encoded.codes,
            row * digits * size,
            size,
            encoded.scales,
            row * groups * 2,
            groups * 2,
            weight.data,
            w_at,
            block,
            groups,
            group,
            out,
            out_at + (row - first) * out_stride,
            out_stride,
        )


@kernel
def _read_rows(rows, data, bits, group, out):  # type: ignore[no-untyped-def]
    size = out.shape[1]
    record = record_bytes(bits, group)
    for i in prange(rows.shape[0]):
        panel, lane = rows[i] // LANES, rows[i] % LANES
        block = panel // PANELS * (size // group) * PANELS + panel % PANELS
        for k in range(size):
            at = (block + k // group * PANELS) * record
            scale = float_of_half(data, at + 2 * lane)
            j = k % group
            if bits == 8:
                code = data[at + SCALE_BYTES + j // 4 * STEP_BYTES + lane * 4 + j % 4]
                out[i, k] = (np.float32(code) - np.float32(128)) * scale
            else:
                byte = data[at + 2 * SCALE_BYTES + j // 8 * STEP_BYTES + lane * 4 + j % 4]
                code = byte & 15 if j % 8 < 4 else byte >> 4
                out[i, k] = np.float32(code) * scale + float_of_half(data, at + SCALE_BYTES + 2 * lane)


def read_code_rows(codes: Packed, size: int, rows: torch.Tensor) -> torch.Tensor:
    """Rows of the first packed matrix [n, size] as float32 [len(rows), size]; rows int64."""
    out = torch.empty((len(rows), size), dtype=torch.float32)
    _, bits, group, _, _ = codes.forms[0]
    _read_rows(rows.numpy(), codes.data, bits, group, out.numpy())
    return out
