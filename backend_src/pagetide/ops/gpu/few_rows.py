"""Products of few rows with a matrix of any form: the matrix streams through once, and is what takes the
time. Its values reach the tensor cores as they are, all of whose types hold them; scales belong to the sums.

A program takes some outputs and a part of the inputs (split-K, as in Stream-K, arXiv:2301.03598); the last
one to end adds up what all have found, always in the same order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from pagetide.ops.gpu.device import num_processors

N_TILE, NUM_WARPS, NUM_STAGES = 64, 4, 4  # outputs of a program; found by compiling, not yet by measuring
STEPS = (128, 64, 32, 16)  # inputs of a step, the most that divide those of the matrix
_FEWEST_ROWS = 16  # of a program: what tensor cores take
_MOST_ROWS, _MOST_OF_PACKED = 64, 32  # what registers hold (scripts/gpu_kernels.md)
_WAVES = 4  # programs for each multiprocessor, about as many as are resident
_FEWEST_STEPS = 4  # that are worth a program of their own
UNSCALED, OF_OUTPUTS, OF_GROUPS = 0, 1, 2  # whose scales there are


@dataclass(frozen=True)
class Streamed:
    """A matrix [out, in] as the kernel reads it.

    values: [out, in] of any type, or uint8 [out, in / 2] of two codes each: in each step of inputs those of
    the first half are the lower four bits of its bytes. scales: [out, groups], minima the same: what a value
    times its scale is added to; None: none.
    """

    values: torch.Tensor
    scales: torch.Tensor | None
    minima: torch.Tensor | None
    inputs: int
    is_packed: bool = False

    @property
    def outputs(self) -> int:
        return len(self.values)

    @property
    def groups(self) -> int:
        """Of inputs, each with scales of its own."""
        return 1 if self.scales is None else self.scales.shape[1]

    @property
    def step(self) -> int:
        """Inputs that are taken at a time."""
        return next(step for step in STEPS if self.inputs % step == 0)

    @property
    def part(self) -> int:
        """Those of a step whose values come in one load, and have one scale."""
        return math.gcd(self.inputs // self.groups, self.step // 2 if self.is_packed else self.step)


@triton.jit
def _add_part(
    total, values, x_places, is_row, scales, minima, group, SCALED: tl.constexpr, HAS_MINIMA: tl.constexpr
):
    """total [outputs, rows] and the products of some inputs, all of one group."""
    rows = tl.load(x_places, mask=is_row[None, :], other=0.0)
    if SCALED < 2:
        total = tl.dot(values.to(rows.dtype), rows, total, input_precision="ieee")
    else:
        products = tl.dot(values.to(rows.dtype), rows, input_precision="ieee")
        total += products * tl.load(scales + group).to(tl.float32)[:, None]
    if HAS_MINIMA:
        # The rows' sums, as a product like any other.
        ones = tl.full(values.shape, 1.0, rows.dtype)
        total += tl.dot(ones, rows, input_precision="ieee") * tl.load(minima + group).to(tl.float32)[:, None]
    return total


@triton.jit(do_not_specialize=["rows", "splits"])
def _few_rows(
    x,
    values,
    scales,
    minima,
    bias,
    out,
    partial,
    arrivals,
    rows,
    outputs,
    inputs,
    groups,
    splits,
    PACKED: tl.constexpr,
    SCALED: tl.constexpr,
    HAS_MINIMA: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STEP: tl.constexpr,
    PART: tl.constexpr,
    N_TILE: tl.constexpr,
    M_TILE: tl.constexpr,
):
    tile, split, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n = (tile * N_TILE + tl.arange(0, N_TILE)).to(tl.int64)
    m = (block * M_TILE + tl.arange(0, M_TILE)).to(tl.int64)
    is_output, is_row = n < outputs, m < rows
    n_read = tl.minimum(n, outputs - 1)  # so that nothing needs a mask on the way
    part = tl.arange(0, PART)
    x_rows = x + m[None, :] * inputs + part[:, None]
    group_size = inputs // groups
    its_scales, its_minima = scales, minima
    if SCALED > 0:
        its_scales = scales + n_read * groups
    if HAS_MINIMA:
        its_minima = minima + n_read * groups

    total = tl.zeros([N_TILE, M_TILE], tl.float32)
    steps = inputs // STEP
    first, last = split * steps // splits, (split + 1) * steps // splits
    for step in range(first, last):
        if PACKED:
            half: tl.constexpr = STEP // 2
            places = values + n_read[:, None] * (inputs // 2) + step * half + part[None, :]
            for at in tl.static_range(0, half, PART):
                codes = tl.load(places + at)
                low = step * STEP + at
                total = _add_part(
                    total, codes & 15, x_rows + low, is_row, its_scales, its_minima, low // group_size,
                    SCALED, HAS_MINIMA,
                )  # fmt: skip
                high = low + half
                total = _add_part(
                    total, codes >> 4, x_rows + high, is_row, its_scales, its_minima, high // group_size,
                    SCALED, HAS_MINIMA,
                )  # fmt: skip
        else:
            places = values + n_read[:, None] * inputs + step * STEP + part[None, :]
            for at in tl.static_range(0, STEP, PART):
                k = step * STEP + at
                total = _add_part(
                    total, tl.load(places + at), x_rows + k, is_row, its_scales, its_minima, k // group_size,
                    SCALED, HAS_MINIMA,
                )  # fmt: skip

    is_there = is_output[:, None] & is_row[None, :]
    target = m[None, :] * outputs + n[:, None]
    if splits > 1:
        size = rows.to(tl.int64) * outputs
        tl.store(partial + split * size + target, total, mask=is_there)
        tl.debug_barrier()  # all warps have stored before the program counts itself
        arrival = arrivals + block * tl.num_programs(0) + tile
        if tl.atomic_add(arrival, 1, sem="acq_rel") < splits - 1:
            return
        tl.store(arrival, 0)
        tl.debug_barrier()
        total = tl.zeros([N_TILE, M_TILE], tl.float32)
        for other in range(splits):
            total += tl.load(partial + other * size + target, mask=is_there, other=0.0, cache_modifier=".cg")
    if SCALED == 1:
        total *= tl.load(its_scales).to(tl.float32)[:, None]
    if HAS_BIAS:
        total += tl.load(bias + n_read).to(tl.float32)[:, None]
    tl.store(out + target, total.to(out.dtype.element_ty), mask=is_there)


def arrivals_for(outputs: int, most_rows: int, device: torch.device) -> torch.Tensor:
    """What counts programs: int32 zeros, for products of up to most_rows rows one after the other."""
    tiles = triton.cdiv(outputs, N_TILE) * triton.cdiv(most_rows, _FEWEST_ROWS)
    return torch.zeros(tiles, dtype=torch.int32, device=device)


def multiply_few_rows(
    x: torch.Tensor,
    weight: Streamed,
    bias: torch.Tensor | None,
    arrivals: torch.Tensor,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """x [t, in], contiguous, times the matrix, plus bias [out]: [t, out] of the given type, or x's.

    arrivals: as arrivals_for makes them, zeros between launches.
    """
    rows, outputs = len(x), weight.outputs
    most = _MOST_OF_PACKED if weight.is_packed else _MOST_ROWS
    m_tile = max(_FEWEST_ROWS, min(most, triton.next_power_of_2(rows)))
    tiles, blocks = triton.cdiv(outputs, N_TILE), triton.cdiv(rows, m_tile)
    wanted = triton.cdiv(_WAVES * num_processors(x.device), tiles * blocks)
    splits = max(1, min(wanted, weight.inputs // weight.step // _FEWEST_STEPS))
    out = torch.empty((rows, outputs), dtype=dtype or x.dtype, device=x.device)
    sums = splits * rows * outputs if splits > 1 else 1
    scaled = UNSCALED if weight.scales is None else OF_OUTPUTS if weight.groups == 1 else OF_GROUPS
    _few_rows[(tiles, splits, blocks)](
        x,
        weight.values,
        weight.scales,
        weight.minima,
        bias,
        out,
        torch.empty(sums, dtype=torch.float32, device=x.device),
        arrivals,
        rows,
        outputs,
        weight.inputs,
        weight.groups,
        splits,
        weight.is_packed,
        scaled if weight.minima is None else OF_GROUPS,
        weight.minima is not None,
        bias is not None,
        weight.step,
        weight.part,
        N_TILE,
        m_tile,
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
    )
    return out


def version() -> str:
    """Changes when the kernel does."""
    return str(_few_rows.cache_key)[:12]
