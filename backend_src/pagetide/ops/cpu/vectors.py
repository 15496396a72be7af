"""Softmax, SiLU, rotation, scaling, stores of bfloat16 and prefetching in LLVM's vector types: what Numba's
own loops do not become by themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from pagetide.ops.cpu.lanes import (
    FAST,
    FLOAT,
    FLOATS,
    HALF,
    INDEX,
    WORD,
    WORDS,
    constant,
    each_vector,
    exp,
    int_constant,
    narrow,
    read_vector,
    reduce,
    spread,
    store,
)
from pagetide.ops.cpu.tile_code import LANES, emit_prefetch

_LOWEST = -3.0e38
_LINE_BYTES = 64


@intrinsic
def soften(typing_context, scores, at, low, high, size, peak, weights, weights_at):  # type: ignore[no-untyped-def]
    """weights[weights_at + i] = exp(scores[at + i] - new peak) for low <= i < high, and 0 for all other i <
    size, a multiple of 16.

    The new peak is the largest of the old one and those scores, or -3e38. Returns it and the sum of the
    weights. scores float32, changed.
    """

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        score_data, weight_data = (
            context.make_array(signature.args[i])(context, builder, args[i]).data for i in (0, 6)
        )
        _, at, low, high, size, peak, _, weights_at = args
        lowest = constant(_LOWEST)
        largest = cgutils.alloca_once_value(builder, spread(builder, peak))
        with cgutils.for_range_slice(builder, int_constant(0), size, int_constant(LANES), INDEX) as (i, _):
            place = builder.bitcast(builder.gep(score_data, [builder.add(at, i)]), FLOATS.as_pointer())
            lanes = builder.add(
                spread(builder, builder.trunc(i, WORD)), ir.Constant(WORDS, list(range(LANES)))
            )
            is_seen = builder.and_(
                builder.icmp_signed(">=", lanes, spread(builder, builder.trunc(low, WORD))),
                builder.icmp_signed("<", lanes, spread(builder, builder.trunc(high, WORD))),
            )
            seen = builder.select(is_seen, builder.load(place, align=4), lowest)
            builder.store(seen, place, align=4)
            before = builder.load(largest)
            builder.store(
                builder.select(builder.fcmp_ordered(">", seen, before, flags=FAST), seen, before), largest
            )
        new_peak = reduce(builder, "fmax", builder.load(largest))
        spread_peak = spread(builder, new_peak)
        total = cgutils.alloca_once_value(builder, constant(0.0))
        with cgutils.for_range_slice(builder, int_constant(0), size, int_constant(LANES), INDEX) as (i, _):
            score = builder.load(
                builder.bitcast(builder.gep(score_data, [builder.add(at, i)]), FLOATS.as_pointer()), align=4
            )
            weight = exp(builder, builder.fsub(score, spread_peak, flags=FAST))
            builder.store(builder.fadd(builder.load(total), weight, flags=FAST), total)
            store(builder, weight, builder.gep(weight_data, [builder.add(weights_at, i)]))
        sum_of_all = reduce(builder, "fadd", builder.load(total))
        return context.make_tuple(builder, signature.return_type, [new_peak, sum_of_all])

    index, result = types.int64, types.UniTuple(types.float32, 2)
    return result(scores, index, index, index, index, types.float32, weights, index), generate


@intrinsic
def store_pair(typing_context, array, at, first, second):  # type: ignore[no-untyped-def]
    """array[at] = first, array[at + 1] = second, for a bfloat16 (uint16) array; at is even.

    float32 arrays are not stored to.
    """

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        if data.type.pointee == HALF:
            pair = ir.Constant(ir.VectorType(FLOAT, 2), ir.Undefined)
            for i in range(2):
                pair = builder.insert_element(pair, args[2 + i], ir.Constant(WORD, i))
            halves = narrow(builder, pair)
            builder.store(
                halves, builder.bitcast(builder.gep(data, [args[1]]), halves.type.as_pointer()), align=4
            )
        return context.get_dummy_value()

    return types.none(array, types.int64, types.float32, types.float32), generate


@intrinsic
def scale(typing_context, x, x_at, factor, count, out, out_at):  # type: ignore[no-untyped-def]
    """out[out_at + i] = x[x_at + i] * factor for i < count, a multiple of 16.

    x float32; out float32 or bfloat16 (uint16).
    """

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        source, target = (
            context.make_array(signature.args[i])(context, builder, args[i]).data for i in (0, 4)
        )
        factors = spread(builder, args[2])
        with each_vector(builder, args[3]) as i:
            product = builder.fmul(read_vector(builder, source, args[1], i), factors, flags=FAST)
            store(builder, product, builder.gep(target, [builder.add(args[5], i)]))
        return context.get_dummy_value()

    index = types.int64
    return types.none(x, index, types.float32, index, out, index), generate


@intrinsic
def scale_by(typing_context, x, x_at, weight, factor, count, out, out_at):  # type: ignore[no-untyped-def]
    """out[out_at + i] = x[x_at + i] * weight[i] * factor, otherwise as scale."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        source, weights, target = (
            context.make_array(signature.args[i])(context, builder, args[i]).data for i in (0, 2, 5)
        )
        factors = spread(builder, args[3])
        with each_vector(builder, args[4]) as i:
            product = builder.fmul(read_vector(builder, source, args[1], i), factors, flags=FAST)
            product = builder.fmul(product, read_vector(builder, weights, int_constant(0), i), flags=FAST)
            store(builder, product, builder.gep(target, [builder.add(args[6], i)]))
        return context.get_dummy_value()

    index = types.int64
    return types.none(x, index, weight, types.float32, index, out, index), generate


@intrinsic
def sum_of_squares(typing_context, x, x_at, count):  # type: ignore[no-untyped-def]
    """Of x[x_at + i] for i < count, a multiple of 16; float32."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        source = context.make_array(signature.args[0])(context, builder, args[0]).data
        total = cgutils.alloca_once_value(builder, constant(0.0))
        with each_vector(builder, args[2]) as i:
            lanes = read_vector(builder, source, args[1], i)
            builder.store(
                builder.fadd(builder.load(total), builder.fmul(lanes, lanes, flags=FAST), flags=FAST), total
            )
        return reduce(builder, "fadd", builder.load(total))

    return types.float32(x, types.int64, types.int64), generate


@intrinsic
def copy(typing_context, x, x_at, count, out, out_at):  # type: ignore[no-untyped-def]
    """out[out_at + i] = x[x_at + i] for i < count; both of one type."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        source, target = (
            context.make_array(signature.args[i])(context, builder, args[i]).data for i in (0, 3)
        )
        if source.type == target.type:
            size = context.get_abi_sizeof(source.type.pointee)
            cgutils.raw_memcpy(
                builder, builder.gep(target, [args[4]]), builder.gep(source, [args[1]]), args[2], size
            )
        return context.get_dummy_value()

    return types.none(x, types.int64, types.int64, out, types.int64), generate


@intrinsic
def clear(typing_context, out, at, count):  # type: ignore[no-untyped-def]
    """out[at + i] = 0 for i < count."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        size = builder.mul(args[2], int_constant(context.get_abi_sizeof(data.type.pointee)))
        cgutils.memset(builder, builder.gep(data, [args[1]]), size, 0)
        return context.get_dummy_value()

    return types.none(out, types.int64, types.int64), generate


@intrinsic(prefer_literal=True)
def weave(typing_context, array, at, rows, low, high):  # type: ignore[no-untyped-def]
    """array[at + 2 * i] = rows' element low + i, array[at + 2 * i + 1] = rows' element high + i, for i < 16.

    low None: what is there stays; high None: zeros. array: bfloat16 (uint16); float32 arrays are not stored
    to. rows float32, of any shape.
    """

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        target, source = (
            context.make_array(signature.args[i])(context, builder, args[i]).data for i in (0, 2)
        )
        if target.type.pointee != HALF:
            return context.get_dummy_value()
        lane_pairs = ir.VectorType(HALF, 2 * LANES)
        place = builder.bitcast(builder.gep(target, [args[1]]), lane_pairs.as_pointer())

        def lanes(first: ir.Value) -> ir.Value:
            floats = builder.load(builder.bitcast(builder.gep(source, [first]), FLOATS.as_pointer()), align=4)
            return narrow(builder, floats)

        def picked(a: ir.Value, b: ir.Value, indices: list[int]) -> ir.Value:
            return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(WORD, len(indices)), indices))

        if low == types.none:
            before = builder.load(place, align=2)
            lows = picked(before, before, list(range(0, 2 * LANES, 2)))
        else:
            lows = lanes(args[3])
        highs = ir.Constant(lows.type, [0] * LANES) if high == types.none else lanes(args[4])
        builder.store(picked(lows, highs, [i // 2 + i % 2 * LANES for i in range(2 * LANES)]), place, align=2)
        return context.get_dummy_value()

    return types.none(array, types.int64, rows, low, high), generate


@intrinsic
def cap(typing_context, x, at, count, limit):  # type: ignore[no-untyped-def]
    """x[at + i] = limit * tanh(x[at + i] / limit) for i < count, a multiple of 16; x float32."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        limits = spread(builder, args[3])
        doubled = builder.fmul(limits, constant(2.0), flags=FAST)
        rates = builder.fdiv(constant(2.0), limits, flags=FAST)
        with each_vector(builder, args[2]) as i:
            power = exp(builder, builder.fmul(read_vector(builder, data, args[1], i), rates, flags=FAST))
            below = builder.fdiv(doubled, builder.fadd(power, constant(1.0), flags=FAST), flags=FAST)
            capped = builder.fsub(limits, below, flags=FAST)
            store(builder, capped, builder.gep(data, [builder.add(args[1], i)]))
        return context.get_dummy_value()

    return types.none(x, types.int64, types.int64, types.float32), generate


@intrinsic
def gate_silu(typing_context, sums, at, out, out_at):  # type: ignore[no-untyped-def]
    """out[out_at + i] = silu(sums[at + i]) * sums[at + 16 + i] for i < 16; sums float32."""
    return _gate(sums, out, lambda builder, value: value)


@intrinsic
def gate_gelu(typing_context, sums, at, out, out_at):  # type: ignore[no-untyped-def]
    """As gate_silu, with GELU by its approximation (arXiv:1606.08415): (1 + tanh(x)) / 2 is sigmoid(2 x)."""

    def slope(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
        square = builder.fmul(value, value, flags=FAST)
        factor = builder.fadd(
            builder.fmul(square, constant(0.0713548163), flags=FAST), constant(1.5957691216), flags=FAST
        )
        return builder.fmul(value, factor, flags=FAST)

    return _gate(sums, out, slope)


def _gate(sums: Any, out: Any, slope: Callable[[ir.IRBuilder, ir.Value], ir.Value]) -> Any:
    """value * sigmoid(slope(value)) * up."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        source, target = (
            context.make_array(signature.args[i])(context, builder, args[i]).data for i in (0, 2)
        )

        def read(offset: int) -> ir.Value:
            place = builder.gep(source, [builder.add(args[1], int_constant(offset))])
            return builder.load(builder.bitcast(place, FLOATS.as_pointer()), align=4)

        value, up = read(0), read(LANES)
        power = exp(builder, builder.fneg(slope(builder, value)))
        scale = builder.fadd(power, constant(1.0), flags=FAST)
        product = builder.fmul(builder.fdiv(value, scale, flags=FAST), up, flags=FAST)
        store(builder, product, builder.gep(target, [args[3]]))
        return context.get_dummy_value()

    return types.none(sums, types.int64, out, types.int64), generate


@intrinsic
def prefetch(typing_context, array, at, size):  # type: ignore[no-untyped-def]
    """Asks for `size` elements from array's element number `at` on to be brought into the cache."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        step = _LINE_BYTES // context.get_abi_sizeof(data.type.pointee)
        with cgutils.for_range_slice(builder, int_constant(0), args[2], int_constant(step), INDEX) as (i, _):
            emit_prefetch(builder, builder.gep(data, [builder.add(args[1], i)]))
        return context.get_dummy_value()

    return types.none(array, types.int64, types.int64), generate
