"""Vectors of 16 lanes in LLVM's terms: what the kernels' intrinsics (ops/cpu/vectors.py) are made of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from llvmlite import ir
from numba.core import cgutils

from pagetide.ops.cpu.compiled import HAS_BF16_DOT
from pagetide.ops.cpu.tile_code import BFLOAT, LANES

FLOAT, WORD, HALF, INDEX = ir.FloatType(), ir.IntType(32), ir.IntType(16), ir.IntType(64)
FLOATS, WORDS = ir.VectorType(FLOAT, LANES), ir.VectorType(WORD, LANES)
FAST = ("reassoc", "contract", "nnan", "nsz")


@contextmanager
def each_vector(builder: ir.IRBuilder, count: ir.Value) -> Iterator[ir.Value]:
    """A loop over count elements, 16 at a time."""
    with cgutils.for_range_slice(builder, int_constant(0), count, int_constant(LANES), INDEX) as (i, _):
        yield i


def read_vector(builder: ir.IRBuilder, data: ir.Value, at: ir.Value, i: ir.Value) -> ir.Value:
    """16 floats from data[at + i] on, aligned or not."""
    place = builder.gep(data, [builder.add(at, i)])
    return builder.load(builder.bitcast(place, FLOATS.as_pointer()), align=4)


def exp(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """As compiled.fast_exp, for 16 lanes."""

    def multiply_add(a: ir.Value, b: ir.Value, c: float | ir.Value) -> ir.Value:
        return builder.fadd(
            builder.fmul(a, b, flags=FAST), constant(c) if isinstance(c, float) else c, flags=FAST
        )

    floor = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(FLOATS, [FLOATS]), "llvm.floor.v16f32"
    )
    is_tiny = builder.fcmp_ordered("<", x, constant(-87.0), flags=FAST)
    is_huge = builder.fcmp_ordered(">", x, constant(88.0), flags=FAST)
    clamped = builder.select(is_tiny, constant(-87.0), builder.select(is_huge, constant(88.0), x))
    n = builder.call(floor, [multiply_add(clamped, constant(1.44269504), 0.5)])
    r = multiply_add(n, constant(2.12194440e-4), multiply_add(n, constant(-0.693359375), clamped))
    p = constant(1.9875691500e-4)
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = multiply_add(p, r, coefficient)
    value = builder.fadd(multiply_add(builder.fmul(p, r, flags=FAST), r, r), constant(1.0), flags=FAST)
    exponent = builder.add(builder.fptosi(n, WORDS), ir.Constant(WORDS, [127] * LANES))
    power = builder.bitcast(builder.shl(exponent, ir.Constant(WORDS, [23] * LANES)), FLOATS)
    return builder.select(is_tiny, constant(0.0), builder.fmul(value, power, flags=FAST))


def store(builder: ir.IRBuilder, floats: ir.Value, pointer: ir.Value) -> None:
    """A vector of floats to a float32 or bfloat16 (uint16) place."""
    is_half = pointer.type.pointee == HALF
    values = narrow(builder, floats) if is_half else floats
    builder.store(values, builder.bitcast(pointer, values.type.as_pointer()), align=2 if is_half else 4)


def narrow(builder: ir.IRBuilder, floats: ir.Value) -> ir.Value:
    """A vector of floats as bfloat16, rounded to nearest, ties to even, in 16-bit words."""
    count = floats.type.count
    if HAS_BF16_DOT:
        return builder.bitcast(
            builder.fptrunc(floats, ir.VectorType(BFLOAT, count)), ir.VectorType(HALF, count)
        )
    words = ir.VectorType(WORD, count)

    def every(value: int) -> ir.Constant:
        return ir.Constant(words, [value] * count)

    bits = builder.bitcast(floats, words)
    odd = builder.and_(builder.lshr(bits, every(16)), every(1))
    rounded = builder.add(builder.add(bits, every(0x7FFF)), odd)
    return builder.trunc(builder.lshr(rounded, every(16)), ir.VectorType(HALF, count))


def reduce(builder: ir.IRBuilder, operation: str, vector: ir.Value) -> ir.Value:
    """One float of a vector by LLVM's operation (`fadd`, `fmax`), in any order."""
    start = [ir.Constant(FLOAT, 0.0)] if operation == "fadd" else []
    kind = ir.FunctionType(FLOAT, [value.type for value in start] + [FLOATS])
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.{operation}.v16f32")
    return builder.call(function, [*start, vector], fastmath=FAST)


def spread(builder: ir.IRBuilder, element: ir.Value) -> ir.Value:
    """All lanes the same."""
    vector = ir.VectorType(element.type, LANES)
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), element, ir.Constant(WORD, 0))
    return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), ir.Constant(WORDS, [0] * LANES))


def constant(value: float) -> ir.Constant:
    """A vector whose lanes are all this value."""
    return ir.Constant(FLOATS, [value] * LANES)


def int_constant(value: int) -> ir.Constant:
    return ir.Constant(INDEX, value)
