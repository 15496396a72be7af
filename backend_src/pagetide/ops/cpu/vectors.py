"""Softmax, SiLU, rotation, scaling, stores of bfloat16 and prefetching in LLVM's vector types: what Numba's
own loops do not become by themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from pagetide.ops.cpu.compiled import HAS_BF16_DOT
from pagetide.ops.cpu.tiles import BFLOAT, LANES, emit_prefetch

_FLOAT, _WORD, _HALF, _INDEX = ir.FloatType(), ir.IntType(32), ir.IntType(16), ir.IntType(64)
_FLOATS, _WORDS = ir.VectorType(_FLOAT, LANES), ir.VectorType(_WORD, LANES)
_FAST = ("reassoc", "contract", "nnan", "nsz")
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
        lowest = _all(_LOWEST)
        largest = cgutils.alloca_once_value(builder, _spread(builder, peak))
        with cgutils.for_range_slice(builder, _int(0), size, _int(LANES), _INDEX) as (i, _):
            place = builder.bitcast(builder.gep(score_data, [builder.add(at, i)]), _FLOATS.as_pointer())
            lanes = builder.add(
                _spread(builder, builder.trunc(i, _WORD)), ir.Constant(_WORDS, list(range(LANES)))
            )
            is_seen = builder.and_(
                builder.icmp_signed(">=", lanes, _spread(builder, builder.trunc(low, _WORD))),
                builder.icmp_signed("<", lanes, _spread(builder, builder.trunc(high, _WORD))),
            )
            seen = builder.select(is_seen, builder.load(place, align=4), lowest)
            builder.store(seen, place, align=4)
            before = builder.load(largest)
            builder.store(
                builder.select(builder.fcmp_ordered(">", seen, before, flags=_FAST), seen, before), largest
            )
        new_peak = _reduce(builder, "fmax", builder.load(largest))
        spread_peak = _spread(builder, new_peak)
        total = cgutils.alloca_once_value(builder, _all(0.0))
        with cgutils.for_range_slice(builder, _int(0), size, _int(LANES), _INDEX) as (i, _):
            score = builder.load(
                builder.bitcast(builder.gep(score_data, [builder.add(at, i)]), _FLOATS.as_pointer()), align=4
            )
            weight = _exp(builder, builder.fsub(score, spread_peak, flags=_FAST))
            builder.store(builder.fadd(builder.load(total), weight, flags=_FAST), total)
            _store(builder, weight, builder.gep(weight_data, [builder.add(weights_at, i)]))
        sum_of_all = _reduce(builder, "fadd", builder.load(total))
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
        if data.type.pointee == _HALF:
            pair = ir.Constant(ir.VectorType(_FLOAT, 2), ir.Undefined)
            for i in range(2):
                pair = builder.insert_element(pair, args[2 + i], ir.Constant(_WORD, i))
            halves = _narrow(builder, pair)
            builder.store(
                halves, builder.bitcast(builder.gep(data, [args[1]]), halves.type.as_pointer()), align=4
            )
        return context.get_dummy_value()

    return types.none(array, types.int64, types.float32, types.float32), generate


@intrinsic
def rotate(typing_context, rows, at, turns, turn_at, half, factor, out, out_at):  # type: ignore[no-untyped-def]
    """Turns the pairs (i, half + i) of rows' elements `at` and on: out[out_at + ...] = them, turned and
    times factor.

    turns, from turn_at on: half cosines, then half sines. half: a multiple of 8. rows, turns float32; out
    float32 or bfloat16 (uint16).
    """
    width = 8

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        source, turn, target = (
            context.make_array(signature.args[i])(context, builder, args[i]).data for i in (0, 2, 6)
        )
        _, at, _, turn_at, half, factor, _, out_at = args
        kind = ir.VectorType(_FLOAT, width)
        one = builder.insert_element(ir.Constant(kind, ir.Undefined), factor, ir.Constant(_WORD, 0))
        factors = builder.shuffle_vector(
            one, ir.Constant(kind, ir.Undefined), ir.Constant(ir.VectorType(_WORD, width), [0] * width)
        )

        def read(data: ir.Value, *offsets: ir.Value) -> ir.Value:
            place = offsets[0]
            for offset in offsets[1:]:
                place = builder.add(place, offset)
            return builder.load(builder.bitcast(builder.gep(data, [place]), kind.as_pointer()), align=4)

        def times(a: ir.Value, b: ir.Value) -> ir.Value:
            return builder.fmul(a, b, flags=_FAST)

        with cgutils.for_range_slice(builder, _int(0), half, _int(width), _INDEX) as (i, _):
            left, right = read(source, at, i), read(source, at, half, i)
            cosine, sine = (
                times(read(turn, turn_at, i), factors),
                times(read(turn, turn_at, half, i), factors),
            )
            place = builder.add(out_at, i)
            _store(
                builder,
                builder.fsub(times(left, cosine), times(right, sine), flags=_FAST),
                builder.gep(target, [place]),
            )
            _store(
                builder,
                builder.fadd(times(right, cosine), times(left, sine), flags=_FAST),
                builder.gep(target, [builder.add(place, half)]),
            )
        return context.get_dummy_value()

    index = types.int64
    return types.none(rows, index, turns, index, index, types.float32, out, index), generate


@intrinsic
def scale(typing_context, x, x_at, factor, count, out, out_at):  # type: ignore[no-untyped-def]
    """out[out_at + i] = x[x_at + i] * factor for i < count, a multiple of 16.

    x float32; out float32 or bfloat16 (uint16).
    """

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        source, target = (
            context.make_array(signature.args[i])(context, builder, args[i]).data for i in (0, 4)
        )
        factors = _spread(builder, args[2])
        with _lanes(builder, args[3]) as i:
            product = builder.fmul(_read(builder, source, args[1], i), factors, flags=_FAST)
            _store(builder, product, builder.gep(target, [builder.add(args[5], i)]))
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
        factors = _spread(builder, args[3])
        with _lanes(builder, args[4]) as i:
            product = builder.fmul(_read(builder, source, args[1], i), factors, flags=_FAST)
            product = builder.fmul(product, _read(builder, weights, _int(0), i), flags=_FAST)
            _store(builder, product, builder.gep(target, [builder.add(args[6], i)]))
        return context.get_dummy_value()

    index = types.int64
    return types.none(x, index, weight, types.float32, index, out, index), generate


@intrinsic
def sum_of_squares(typing_context, x, x_at, count):  # type: ignore[no-untyped-def]
    """Of x[x_at + i] for i < count, a multiple of 16; float32."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        source = context.make_array(signature.args[0])(context, builder, args[0]).data
        total = cgutils.alloca_once_value(builder, _all(0.0))
        with _lanes(builder, args[2]) as i:
            lanes = _read(builder, source, args[1], i)
            builder.store(
                builder.fadd(builder.load(total), builder.fmul(lanes, lanes, flags=_FAST), flags=_FAST), total
            )
        return _reduce(builder, "fadd", builder.load(total))

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
        size = builder.mul(args[2], _int(context.get_abi_sizeof(data.type.pointee)))
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
        if target.type.pointee != _HALF:
            return context.get_dummy_value()
        lane_pairs = ir.VectorType(_HALF, 2 * LANES)
        place = builder.bitcast(builder.gep(target, [args[1]]), lane_pairs.as_pointer())

        def lanes(first: ir.Value) -> ir.Value:
            floats = builder.load(
                builder.bitcast(builder.gep(source, [first]), _FLOATS.as_pointer()), align=4
            )
            return _narrow(builder, floats)

        def picked(a: ir.Value, b: ir.Value, indices: list[int]) -> ir.Value:
            return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_WORD, len(indices)), indices))

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
def gate(typing_context, sums, at, out, out_at):  # type: ignore[no-untyped-def]
    """out[out_at + i] = silu(sums[at + i]) * sums[at + 16 + i] for i < 16; sums float32."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        source, target = (
            context.make_array(signature.args[i])(context, builder, args[i]).data for i in (0, 2)
        )

        def read(offset: int) -> ir.Value:
            place = builder.gep(source, [builder.add(args[1], _int(offset))])
            return builder.load(builder.bitcast(place, _FLOATS.as_pointer()), align=4)

        value, up = read(0), read(LANES)
        scale = builder.fadd(_exp(builder, builder.fneg(value)), _all(1.0), flags=_FAST)
        product = builder.fmul(builder.fdiv(value, scale, flags=_FAST), up, flags=_FAST)
        _store(builder, product, builder.gep(target, [args[3]]))
        return context.get_dummy_value()

    return types.none(sums, types.int64, out, types.int64), generate


@intrinsic
def prefetch(typing_context, array, at, size):  # type: ignore[no-untyped-def]
    """Asks for `size` elements from array's element number `at` on to be brought into the cache."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        step = _LINE_BYTES // (2 if data.type.pointee == _HALF else 4)
        with cgutils.for_range_slice(builder, _int(0), args[2], _int(step), _INDEX) as (i, _):
            emit_prefetch(builder, builder.gep(data, [builder.add(args[1], i)]))
        return context.get_dummy_value()

    return types.none(array, types.int64, types.int64), generate


@contextmanager
def _lanes(builder: ir.IRBuilder, count: ir.Value) -> Iterator[ir.Value]:
    """A loop over count elements, 16 at a time."""
    with cgutils.for_range_slice(builder, _int(0), count, _int(LANES), _INDEX) as (i, _):
        yield i


def _read(builder: ir.IRBuilder, data: ir.Value, at: ir.Value, i: ir.Value) -> ir.Value:
    place = builder.gep(data, [builder.add(at, i)])
    return builder.load(builder.bitcast(place, _FLOATS.as_pointer()), align=4)


def _exp(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """As compiled.fast_exp, for 16 lanes."""

    def multiply_add(a: ir.Value, b: ir.Value, c: float | ir.Value) -> ir.Value:
        return builder.fadd(
            builder.fmul(a, b, flags=_FAST), _all(c) if isinstance(c, float) else c, flags=_FAST
        )

    floor = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(_FLOATS, [_FLOATS]), "llvm.floor.v16f32"
    )
    is_tiny = builder.fcmp_ordered("<", x, _all(-87.0), flags=_FAST)
    is_huge = builder.fcmp_ordered(">", x, _all(88.0), flags=_FAST)
    clamped = builder.select(is_tiny, _all(-87.0), builder.select(is_huge, _all(88.0), x))
    n = builder.call(floor, [multiply_add(clamped, _all(1.44269504), 0.5)])
    r = multiply_add(n, _all(2.12194440e-4), multiply_add(n, _all(-0.693359375), clamped))
    p = _all(1.9875691500e-4)
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = multiply_add(p, r, coefficient)
    value = builder.fadd(multiply_add(builder.fmul(p, r, flags=_FAST), r, r), _all(1.0), flags=_FAST)
    exponent = builder.add(builder.fptosi(n, _WORDS), ir.Constant(_WORDS, [127] * LANES))
    power = builder.bitcast(builder.shl(exponent, ir.Constant(_WORDS, [23] * LANES)), _FLOATS)
    return builder.select(is_tiny, _all(0.0), builder.fmul(value, power, flags=_FAST))


def _store(builder: ir.IRBuilder, floats: ir.Value, pointer: ir.Value) -> None:
    """A vector of floats to a float32 or bfloat16 (uint16) place."""
    is_half = pointer.type.pointee == _HALF
    values = _narrow(builder, floats) if is_half else floats
    builder.store(values, builder.bitcast(pointer, values.type.as_pointer()), align=2 if is_half else 4)


def _narrow(builder: ir.IRBuilder, floats: ir.Value) -> ir.Value:
    """A vector of floats as bfloat16, rounded to nearest, ties to even, in 16-bit words."""
    count = floats.type.count
    if HAS_BF16_DOT:
        return builder.bitcast(
            builder.fptrunc(floats, ir.VectorType(BFLOAT, count)), ir.VectorType(_HALF, count)
        )
    words = ir.VectorType(_WORD, count)

    def every(value: int) -> ir.Constant:
        return ir.Constant(words, [value] * count)

    bits = builder.bitcast(floats, words)
    odd = builder.and_(builder.lshr(bits, every(16)), every(1))
    rounded = builder.add(builder.add(bits, every(0x7FFF)), odd)
    return builder.trunc(builder.lshr(rounded, every(16)), ir.VectorType(_HALF, count))


def _reduce(builder: ir.IRBuilder, operation: str, vector: ir.Value) -> ir.Value:
    start = [ir.Constant(_FLOAT, 0.0)] if operation == "fadd" else []
    kind = ir.FunctionType(_FLOAT, [value.type for value in start] + [_FLOATS])
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.{operation}.v16f32")
    return builder.call(function, [*start, vector], fastmath=_FAST)


def _spread(builder: ir.IRBuilder, element: ir.Value) -> ir.Value:
    """All lanes the same."""
    vector = ir.VectorType(element.type, LANES)
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), element, ir.Constant(_WORD, 0))
    return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), ir.Constant(_WORDS, [0] * LANES))


def _all(value: float) -> ir.Constant:
    return ir.Constant(_FLOATS, [value] * LANES)


def _int(value: int) -> ir.Constant:
    return ir.Constant(_INDEX, value)
