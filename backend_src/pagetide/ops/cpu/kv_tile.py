"""The register tile of attention over a cache of 8-bit integers: a few rows of two digits times 16 tokens of
keys, or 16 elements of values, for each panel; exact sums in 32-bit integers.

A page of 16 tokens begins with their 16 scales (float32); codes follow, 128 larger than what they stand for:

   keys      [head_dim / 4, 16 tokens, 4]
   values    [head_dim / 16, 4, 16 elements, 4 tokens]
"""

from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from pagetide.ops.cpu.codes_tile import STEP_BYTES, byte_dot, joined_digits
from pagetide.ops.cpu.lanes import FAST, FLOATS, INDEX, WORD, WORDS, constant, int_constant, spread
from pagetide.ops.cpu.tile_code import LANES, data_of

PAGE_HEADER = 4 * LANES  # bytes of a page's scales
_DIGITS = 2
KV_ROWS = 4  # of a tile, at most


@intrinsic(prefer_literal=True)
def tile_of_rounded_pages(  # type: ignore[no-untyped-def]
    typing_context,
    rows,
    panels,
    are_keys,
    x,
    x_at,
    digit_stride,
    scales,
    scales_at,
    kv,
    places,
    places_at,
    num_pages,
    at,
    apart,
    steps,
    out,
    out_at,
    out_stride,
):
    """Keys: out[r, p * 16 + token] = scale(r) * scale(token) * the sum of x[r] times codes; values: out[r, p
    * 16 + i] += scale(r) * the sum over all pages.

    rows: at most KV_ROWS; panels (1 or 2), are_keys: literals; one panel takes KV_ROWS. x int8, two
    digits of a row `digit_stride` apart, the next row behind them; scales float32, two for each row
    (encoding.encode_group). kv uint8; places, from its element places_at on: where pages begin; panels begin
    `at` behind that, `apart` from each other, of so many steps of four elements.
    """
    if not (isinstance(panels, types.Literal) and isinstance(are_keys, types.Literal)):
        return None
    num_panels, of_keys = panels.literal_value, are_keys.literal_value

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        def data(number: int) -> ir.Value:
            return data_of(context, builder, signature.args[number], args[number])

        def pointer(base: ir.Value, offset: ir.Value, kind: ir.Type) -> ir.Value:
            return builder.bitcast(builder.gep(base, [offset]), kind.as_pointer())

        own, factors = builder.gep(data(3), [args[4]]), builder.gep(data(6), [args[7]])
        stride, pages, panel_at, apart, steps = args[5], args[11], args[12], args[13], args[14]
        first = builder.gep(data(9), [args[10]])
        out = builder.gep(data(15), [args[16]])

        def emit(num_rows: int) -> None:
            sums = []
            for r in range(num_rows):
                place = pointer(factors, int_constant(2 * r + 1), WORD)
                start = spread(builder, builder.load(place, align=4))
                sums.append(
                    [
                        [
                            cgutils.alloca_once_value(builder, value)
                            for value in (start, ir.Constant(WORDS, [0] * LANES))
                        ]
                        for _ in range(num_panels)
                    ]
                )
            with cgutils.for_range(builder, pages, intp=INDEX) as page:
                base = builder.gep(
                    data(8), [builder.add(builder.load(builder.gep(first, [page.index])), panel_at)]
                )
                element = builder.mul(builder.mul(page.index, steps), int_constant(4))
                with cgutils.for_range(builder, steps, intp=INDEX) as step:
                    offset = builder.mul(step.index, int_constant(STEP_BYTES))
                    codes = [
                        builder.load(
                            pointer(base, builder.add(offset, builder.mul(apart, int_constant(p))), WORDS),
                            align=4,
                        )
                        for p in range(num_panels)
                    ]
                    four = builder.add(element, builder.mul(step.index, int_constant(4)))
                    for r in range(num_rows):
                        for digit in range(_DIGITS):
                            row = builder.mul(stride, int_constant(_DIGITS * r + digit))
                            word = builder.load(pointer(own, builder.add(row, four), WORD), align=1)
                            for p in range(num_panels):
                                total = sums[r][p][digit]
                                builder.store(
                                    byte_dot(builder, builder.load(total), codes[p], spread(builder, word)),
                                    total,
                                )
            page_at = builder.gep(data(8), [builder.load(first)])
            for r in range(num_rows):
                factor = spread(builder, builder.load(builder.gep(factors, [int_constant(2 * r)])))
                for p in range(num_panels):
                    whole = joined_digits(builder, [builder.load(digit) for digit in sums[r][p]])
                    value = builder.fmul(builder.sitofp(whole, FLOATS), factor, flags=FAST)
                    column = builder.add(builder.mul(args[17], int_constant(r)), int_constant(p * LANES))
                    place = pointer(out, column, FLOATS)
                    if of_keys:
                        lanes = pointer(page_at, builder.mul(apart, int_constant(p)), FLOATS)
                        value = builder.fmul(value, builder.load(lanes, align=4), flags=FAST)
                    else:
                        value = builder.fadd(builder.load(place, align=4), value, flags=FAST)
                    builder.store(value, place, align=4)

        if num_panels == 1:
            emit(KV_ROWS)
        else:
            for size in range(1, KV_ROWS + 1):
                with builder.if_then(builder.icmp_signed("==", args[0], int_constant(size))):
                    emit(size)
        return context.get_dummy_value()

    i = types.int64
    return types.none(i, panels, are_keys, x, i, i, scales, i, kv, places, i, i, i, i, i, out, i, i), generate


@intrinsic
def scale_by_tokens(typing_context, weights, at, kv, page):  # type: ignore[no-untyped-def]
    """weights[at + i] *= the scale of token i of the page that begins at kv's byte `page`, for i < 16; a
    weight of 0 stays 0, whatever the scale is.
    """

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        target, source = (data_of(context, builder, signature.args[i], args[i]) for i in (0, 2))
        place = builder.bitcast(builder.gep(target, [args[1]]), FLOATS.as_pointer())
        scales = builder.load(builder.bitcast(builder.gep(source, [args[3]]), FLOATS.as_pointer()), align=4)
        before = builder.load(place, align=4)
        is_zero = builder.fcmp_ordered("==", before, constant(0.0))
        builder.store(builder.select(is_zero, before, builder.fmul(before, scales)), place, align=4)
        return context.get_dummy_value()

    return types.none(weights, types.int64, kv, types.int64), generate


@intrinsic
def put_float(typing_context, data, at, value):  # type: ignore[no-untyped-def]
    """The four bytes of uint8 data from `at` on = a float32."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        place = builder.gep(data_of(context, builder, signature.args[0], args[0]), [args[1]])
        builder.store(args[2], builder.bitcast(place, args[2].type.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.none(data, types.int64, types.float32), generate
