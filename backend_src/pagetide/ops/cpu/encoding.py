"""Activations as 8-bit integers, and single elements of packed records, in LLVM's vector types."""

from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from pagetide.ops.cpu.lanes import (
    FAST,
    FLOAT,
    FLOATS,
    HALF,
    WORD,
    WORDS,
    constant,
    each_vector,
    read_vector,
    reduce,
    spread,
)
from pagetide.ops.cpu.tile_code import LANES, data_of

_BYTES = ir.VectorType(ir.IntType(8), LANES)


def _sum_exactly(builder: ir.IRBuilder, vector: ir.Value) -> ir.Value:
    """One float of a vector, in whose sum numbers are not taken for granted."""
    kind = ir.FunctionType(FLOAT, [FLOAT, FLOATS])
    add = cgutils.get_or_insert_function(builder.module, kind, "llvm.vector.reduce.fadd.v16f32")
    return builder.call(add, [ir.Constant(FLOAT, 0.0), vector])


@intrinsic
def encode_group(typing_context, x, at, count, is_symmetric, codes, codes_at, upper_at, scales, scales_at):  # type: ignore[no-untyped-def]
    """codes[codes_at + i] = x[at + i] / scale, rounded, for i < count, a multiple of 16; the largest becomes
    127 or -127. With upper_at >= 0 it becomes 127 * 256: codes[upper_at + i] is what is worth 256.

    scales[scales_at] = scale; the next one is what the matrix's codes need: where they are symmetric, -128
    times the sum of x / scale as a 32-bit integer, otherwise the sum times the scale. x float32 or bfloat16
    (uint16), codes int8, scales float32.
    """

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        source, target, factors = (data_of(context, builder, signature.args[i], args[i]) for i in (0, 4, 7))
        _, at, count, is_symmetric, _, codes_at, upper_at, _, scales_at = args

        def function(name: str) -> ir.Function:
            return cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(FLOATS, [FLOATS]), f"llvm.{name}.v16f32"
            )

        def read(i: ir.Value) -> ir.Value:
            if source.type.pointee != HALF:
                return read_vector(builder, source, at, i)
            place = builder.bitcast(
                builder.gep(source, [builder.add(at, i)]), ir.VectorType(HALF, LANES).as_pointer()
            )
            wide = builder.zext(builder.load(place, align=2), WORDS)
            return builder.bitcast(builder.shl(wide, ir.Constant(WORDS, [16] * LANES)), FLOATS)

        largest = cgutils.alloca_once_value(builder, constant(0.0))
        nothing = cgutils.alloca_once_value(builder, constant(0.0))
        with each_vector(builder, count) as i:
            value = read(i)
            builder.store(builder.fadd(builder.load(nothing), builder.fmul(value, constant(0.0))), nothing)
            size, before = builder.call(function("fabs"), [value]), builder.load(largest)
            builder.store(
                builder.select(builder.fcmp_ordered(">", size, before, flags=FAST), size, before), largest
            )
        peak = reduce(builder, "fmax", builder.load(largest))
        some = builder.select(
            builder.fcmp_ordered(">", peak, ir.Constant(FLOAT, 1e-30)), peak, ir.Constant(FLOAT, 1e-30)
        )
        has_upper = builder.icmp_signed(">=", upper_at, ir.Constant(upper_at.type, 0))
        most = builder.select(has_upper, ir.Constant(FLOAT, 127.0 * 256), ir.Constant(FLOAT, 127.0))
        steps = spread(builder, builder.fdiv(most, some))
        total = cgutils.alloca_once_value(builder, ir.Constant(WORDS, [0] * LANES))

        def put(words: ir.Value, at: ir.Value) -> None:
            place = builder.bitcast(builder.gep(target, [at]), _BYTES.as_pointer())
            builder.store(builder.trunc(words, _BYTES), place, align=1)

        with each_vector(builder, count) as i:
            rounded = builder.call(function("rint"), [builder.fmul(read(i), steps)])
            words = builder.fptosi(rounded, WORDS)
            put(words, builder.add(codes_at, i))
            with builder.if_then(has_upper):
                nearest = builder.add(words, ir.Constant(WORDS, [128] * LANES))
                put(builder.ashr(nearest, ir.Constant(WORDS, [8] * LANES)), builder.add(upper_at, i))
            builder.store(builder.add(builder.load(total), words), total)
        kind = ir.FunctionType(WORD, [WORDS])
        add = cgutils.get_or_insert_function(builder.module, kind, "llvm.vector.reduce.add.v16i32")
        sum_of_codes = builder.call(add, [builder.load(total)])
        # What is no number must not become one, or nobody would see it: zero for all others.
        scale = builder.fadd(builder.fdiv(some, most), _sum_exactly(builder, builder.load(nothing)))
        builder.store(scale, builder.gep(factors, [scales_at]))
        needed = builder.select(
            is_symmetric,
            builder.bitcast(builder.mul(sum_of_codes, ir.Constant(WORD, -128)), FLOAT),
            builder.fmul(builder.sitofp(sum_of_codes, FLOAT), scale),
        )
        builder.store(needed, builder.gep(factors, [builder.add(scales_at, ir.Constant(scales_at.type, 1))]))
        return context.get_dummy_value()

    index = types.int64
    return types.none(x, index, index, types.boolean, codes, index, index, scales, index), generate


@intrinsic
def float_of_half(typing_context, data, at):  # type: ignore[no-untyped-def]
    """The bfloat16 in bytes at and at + 1 of uint8 data, as float32."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        place = builder.gep(data_of(context, builder, signature.args[0], args[0]), [args[1]])
        half = builder.load(builder.bitcast(place, HALF.as_pointer()), align=1)
        return builder.bitcast(builder.shl(builder.zext(half, WORD), ir.Constant(WORD, 16)), FLOAT)

    return types.float32(data, types.int64), generate
