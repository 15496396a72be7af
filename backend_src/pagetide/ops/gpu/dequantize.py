"""Matrices as they are multiplied: packed as kernels stream them, or written out for products of many rows;
and rows as FP8."""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl

from pagetide.ops.gpu.device import FP8, FP8_MAX
from pagetide.ops.gpu.few_rows import STEPS, Streamed
from pagetide.ops.weights import DenseWeight, Fp8Weight, QuantizedWeight, Weight

_BLOCK = 1024


def streamed(weight: Weight) -> Streamed:
    """A matrix as the kernels read it. Raises ValueError where its sizes do not allow it."""
    inputs = weight.shape[1]
    if inputs % STEPS[-1]:
        raise ValueError(f"{inputs} inputs are not whole {STEPS[-1]}s")
    found = _packed(weight) if isinstance(weight, QuantizedWeight) else _as_it_is(weight)
    if found.part < STEPS[-1]:
        raise ValueError(f"groups of {inputs // found.groups} inputs are not whole {STEPS[-1]}s")
    return found


def _as_it_is(weight: DenseWeight | Fp8Weight) -> Streamed:
    scales = weight.scales.contiguous() if isinstance(weight, Fp8Weight) else None
    return Streamed(weight.values.contiguous(), scales, None, weight.shape[1])


def _packed(weight: QuantizedWeight) -> Streamed:
    """Codes of 8 bits are symmetric and become signed; two of 4 bits share a byte where half a step is wide
    enough for a product.
    """
    inputs, scales, minima = weight.shape[1], weight.scales.bfloat16(), weight.minima.bfloat16()
    if weight.bits == 8:
        return Streamed((weight.codes ^ 128).view(torch.int8).contiguous(), scales, None, inputs)
    plain = Streamed(weight.codes.contiguous(), scales, minima, inputs)
    half = plain.step // 2
    if half < STEPS[-1]:
        return plain
    low, high = weight.codes.view(len(weight.codes), -1, 2, half).unbind(2)
    return replace(plain, values=(low | high << 4).flatten(1), is_packed=True)


@triton.jit(do_not_specialize_on_alignment=["chosen"])
def _dequantize(
    values,
    scales,
    minima,
    chosen,
    out,
    inputs,
    groups,
    PACKED: tl.constexpr,
    HAS_MINIMA: tl.constexpr,
    CHOOSES: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    target = tl.program_id(0).to(tl.int64)
    row = target
    if CHOOSES:
        row = tl.load(chosen + target)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < inputs
    if PACKED:
        of_step = at % STEP
        byte = at // STEP * (STEP // 2) + of_step % (STEP // 2)
        both = tl.load(values + row * (inputs // 2) + byte, mask=inside, other=0)
        codes = tl.where(of_step < STEP // 2, both & 15, both >> 4)
    else:
        codes = tl.load(values + row * inputs + at, mask=inside, other=0.0)
    group = row * groups + at // (inputs // groups)
    result = codes.to(tl.float32) * tl.load(scales + group, mask=inside, other=0.0).to(tl.float32)
    if HAS_MINIMA:
        result += tl.load(minima + group, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + target * inputs + at, result.to(out.dtype.element_ty), mask=inside)


def dequantize(weight: Streamed, dtype: torch.dtype, rows: torch.Tensor | None = None) -> torch.Tensor:
    """The matrix [out, in], or some of its rows: int64 [t] -> [t, in]. What is dense stays as it is."""
    if weight.scales is None:
        return weight.values if rows is None else weight.values[rows]
    number = weight.outputs if rows is None else len(rows)
    out = torch.empty((number, weight.inputs), dtype=dtype, device=weight.values.device)
    _dequantize[(number, triton.cdiv(weight.inputs, _BLOCK))](
        weight.values,
        weight.scales,
        weight.minima,
        rows,
        out,
        weight.inputs,
        weight.groups,
        weight.is_packed,
        weight.minima is not None,
        rows is not None,
        weight.step,
        _BLOCK,
        num_warps=4,
    )
    return out


@triton.jit
def _rows_to_fp8(x, values, scales, MAX: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    largest = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, SIZE, BLOCK):
        found = tl.load(x + row * SIZE + begin + at, mask=begin + at < SIZE, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(found))
    scale = tl.max(largest, 0) / MAX
    tl.store(scales + row, scale)
    factor = 1.0 / tl.where(scale > 0, scale, 1.0)
    for begin in range(0, SIZE, BLOCK):
        inside = begin + at < SIZE
        found = tl.load(x + row * SIZE + begin + at, mask=inside, other=0.0).to(tl.float32) * factor
        tl.store(values + row * SIZE + begin + at, found.to(values.dtype.element_ty), mask=inside)


def rows_to_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row [t, size] with the scale that lets its largest element just fit: float8_e4m3fn [t, size] and
    float32 [t, 1].
    """
    tokens, size = x.shape
    values = torch.empty_like(x, dtype=FP8)
    scales = torch.empty((tokens, 1), dtype=torch.float32, device=x.device)
    _rows_to_fp8[(tokens,)](x, values, scales, FP8_MAX, size, 2 * _BLOCK, num_warps=4)
    return values, scales
