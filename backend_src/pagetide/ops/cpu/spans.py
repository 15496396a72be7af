"""What sampling asks of some of a row's logits at once, in LLVM's vector types (ops/cpu/lanes.py).

All take count float32 values from number `at` of a row on, any count: what is missing to the last vector is
read as minus infinity.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from pagetide.ops.cpu.lanes import (
    FAST,
    FLOATS,
    INDEX,
    WORD,
    WORDS,
    constant,
    each_vector,
    exp,
    int_constant,
    reduce,
    spread,
)
from pagetide.ops.cpu.tile_code import LANES

_LANE_NUMBERS = ir.Constant(WORDS, list(range(LANES)))
_INFINITE = 0x7F800000  # bits of infinity


def _every(value: int) -> ir.Constant:
    return ir.Constant(WORDS, [value] * LANES)


@contextmanager
def _each_vector(
    context: Any, builder: ir.IRBuilder, signature: Any, args: Any
) -> Iterator[tuple[ir.Value, ir.Value, ir.Value]]:
    """A loop over the vectors of (values, at, count, ...): (number of the first lane's value, which lanes
    have one, 16 values).
    """
    data = context.make_array(signature.args[0])(context, builder, args[0]).data
    masked = FLOATS.as_pointer(), WORD, ir.VectorType(ir.IntType(1), LANES), FLOATS
    load = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(FLOATS, masked), "llvm.masked.load.v16f32.p0"
    )
    with each_vector(builder, args[2]) as i:
        first = builder.add(args[1], i)
        left = spread(builder, builder.trunc(builder.sub(args[2], i), WORD))
        place = builder.bitcast(builder.gep(data, [first]), FLOATS.as_pointer())
        is_there = builder.icmp_signed("<", _LANE_NUMBERS, left)
        yield (
            first,
            is_there,
            builder.call(load, [place, ir.Constant(WORD, 4), is_there, constant(float("-inf"))]),
        )


@intrinsic
def largest_order(typing_context, values, at, count):  # type: ignore[no-untyped-def]
    """The largest of the values as an int32 that is larger where the value is (bits whose magnitude is
    inverted for negative ones): 2 ** 31 - 1 if one is no number.
    """

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        largest = cgutils.alloca_once_value(builder, _every(-0x80000000))
        with _each_vector(context, builder, signature, args) as (_, _, lanes):
            bits = builder.bitcast(lanes, WORDS)
            magnitude = builder.and_(bits, _every(0x7FFFFFFF))
            inverted = builder.and_(builder.ashr(bits, _every(31)), _every(0x7FFFFFFF))
            is_number = builder.icmp_signed("<=", magnitude, _every(_INFINITE))
            order = builder.select(is_number, builder.xor(bits, inverted), _every(0x7FFFFFFF))
            before = builder.load(largest)
            builder.store(builder.select(builder.icmp_signed(">", order, before), order, before), largest)
        find = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(WORD, [WORDS]), "llvm.vector.reduce.smax.v16i32"
        )
        return builder.call(find, [builder.load(largest)])

    return types.int32(values, types.int64, types.int64), generate


@intrinsic
def masses(typing_context, values, at, count, rate, highest, floor, border):  # type: ignore[no-untyped-def]
    """The sums of exp(rate * value - highest) over the values with rate * value >= floor, and over those with
    rate * value > border.
    """

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        rate, highest, floor, border = (spread(builder, value) for value in args[3:])
        sums = [cgutils.alloca_once_value(builder, constant(0.0)) for _ in range(2)]
        with _each_vector(context, builder, signature, args) as (_, _, lanes):
            scaled = builder.fmul(lanes, rate)
            own = exp(builder, builder.fsub(scaled, highest, flags=FAST))
            counts = (builder.fcmp_ordered(">=", scaled, floor), builder.fcmp_ordered(">", scaled, border))
            for total, is_counted in zip(sums, counts, strict=True):
                summand = builder.select(is_counted, own, constant(0.0))
                builder.store(builder.fadd(builder.load(total), summand, flags=FAST), total)
        found = [reduce(builder, "fadd", builder.load(total)) for total in sums]
        return context.make_tuple(builder, signature.return_type, found)

    index, number, result = types.int64, types.float32, types.UniTuple(types.float32, 2)
    return result(values, index, index, number, number, number, number), generate


@intrinsic
def at_least(typing_context, values, at, count, border):  # type: ignore[no-untyped-def]
    """Bit i: whether value at + i, for i < count <= 64, is at least border."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        border = spread(builder, args[3])
        found = _Bits(builder, args[1])
        with _each_vector(context, builder, signature, args) as (first, is_there, lanes):
            found.add(first, builder.and_(is_there, builder.fcmp_ordered(">=", lanes, border)))
        return found.all()

    index = types.int64
    return types.uint64(values, index, index, types.float32), generate


@intrinsic
def can_win(typing_context, values, at, count, rate, floor, best, state):  # type: ignore[no-untyped-def]
    """Bit i: whether token at + i, for i < count <= 64, may beat a sum of logit and noise of `best`: it has
    rate * value >= floor and 1 - uniform < exp(rate * value - best), of which a bound is taken.

    The bound is a float whose bits are a linear function of the exponent (Schraudolph 1999): a secant of the
    power, at most 6 % above it. state: uint32; uniform as in ops.reference.gumbel_noise.
    """

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        rate, floor, best, state = (spread(builder, value) for value in args[3:])
        found = _Bits(builder, args[1])
        with _each_vector(context, builder, signature, args) as (first, is_there, lanes):
            token = builder.add(spread(builder, builder.trunc(first, WORD)), _LANE_NUMBERS)
            hashed = _mix(builder, builder.add(token, _every(0x9E3779B9)))
            bits = builder.lshr(_mix(builder, builder.xor(state, hashed)), _every(9))
            # 2^23 (1 - uniform), of which the power below is 2^23 times too.
            rest = builder.fsub(builder.sitofp(builder.sub(_every(2**23), bits), FLOATS), constant(0.5))
            scaled = builder.fmul(lanes, rate)
            exponent = builder.fsub(scaled, best, flags=FAST)
            is_tiny = builder.fcmp_ordered("<", exponent, constant(-80.0))
            exponent = builder.select(is_tiny, constant(-80.0), exponent)
            # A thousandth more for what is rounded.
            exponent = builder.fmul(exponent, constant(2**23 / math.log(2)), flags=FAST)
            exponent = builder.fadd(exponent, constant((127 + 23 + 0.001) * 2**23), flags=FAST)
            power = builder.bitcast(builder.fptosi(exponent, WORDS), FLOATS)
            wins = builder.fcmp_ordered(">", power, rest)
            allowed = builder.and_(is_there, builder.fcmp_ordered(">=", scaled, floor))
            found.add(first, builder.and_(wins, allowed))
        return found.all()

    index, number = types.int64, types.float32
    return types.uint64(values, index, index, number, number, number, types.uint32), generate


class _Bits:
    """Code that collects one bit of each value from number `at` on."""

    def __init__(self, builder: ir.IRBuilder, at: ir.Value):
        self._builder, self._at = builder, at
        self._found = cgutils.alloca_once_value(builder, int_constant(0))

    def add(self, first: ir.Value, lanes: ir.Value) -> None:
        builder = self._builder
        word = builder.zext(builder.bitcast(lanes, ir.IntType(LANES)), INDEX)
        word = builder.shl(word, builder.sub(first, self._at))
        builder.store(builder.or_(builder.load(self._found), word), self._found)

    def all(self) -> ir.Value:
        return self._builder.load(self._found)


@intrinsic
def first_bit(typing_context, bits):  # type: ignore[no-untyped-def]
    """The number of the lowest bit that is set; some is."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.uint64), generate


@intrinsic
def num_bits(typing_context, bits):  # type: ignore[no-untyped-def]
    """How many bits are set."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.ctpop(args[0])

    return types.int64(types.uint64), generate


def _mix(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """ops.reference._mix"""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = builder.mul(builder.xor(x, builder.lshr(x, _every(shift))), _every(factor))
    return builder.xor(x, builder.lshr(x, _every(16)))
