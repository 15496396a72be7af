"""The rotation of rotary embeddings in LLVM's vector types."""

from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from pagetide.ops.cpu.lanes import FAST, FLOAT, INDEX, WORD, int_constant, store


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
        kind = ir.VectorType(FLOAT, width)
        one = builder.insert_element(ir.Constant(kind, ir.Undefined), factor, ir.Constant(WORD, 0))
        factors = builder.shuffle_vector(
            one, ir.Constant(kind, ir.Undefined), ir.Constant(ir.VectorType(WORD, width), [0] * width)
        )

        def read(data: ir.Value, *offsets: ir.Value) -> ir.Value:
            place = offsets[0]
            for offset in offsets[1:]:
                place = builder.add(place, offset)
            return builder.load(builder.bitcast(builder.gep(data, [place]), kind.as_pointer()), align=4)

        def times(a: ir.Value, b: ir.Value) -> ir.Value:
            return builder.fmul(a, b, flags=FAST)

        with cgutils.for_range_slice(builder, int_constant(0), half, int_constant(width), INDEX) as (i, _):
            left, right = read(source, at, i), read(source, at, half, i)
            cosine, sine = (
                times(read(turn, turn_at, i), factors),
                times(read(turn, turn_at, half, i), factors),
            )
            place = builder.add(out_at, i)
            store(
                builder,
                builder.fsub(times(left, cosine), times(right, sine), flags=FAST),
                builder.gep(target, [place]),
            )
            store(
                builder,
                builder.fadd(times(right, cosine), times(left, sine), flags=FAST),
                builder.gep(target, [builder.add(place, half)]),
            )
        return context.get_dummy_value()

    index = types.int64
    return types.none(rows, index, turns, index, index, types.float32, out, index), generate
