"""The register tile under every matrix product on a CPU: a few rows of x times 16 outputs for each panel of
packed weights.

A matrix [n, k] is packed into panels of 16 outputs. In a panel, bfloat16 elements stand in pairs along k,
which is what the processor's bfloat16 dot product (AVX512_BF16) takes, and one 32-bit word that other
processors widen with a shift and a mask:

   bfloat16  [n / 16, k / 2, 16, 2]          float32  [n / 16, k, 16]

Keys and values in the cache are packed the same way, 16 tokens to a page (see kv_cache/layout.py), so that
attention is made of these tiles too. x is bfloat16 (uint16) where the processor has the dot product, and
float32 otherwise; sums are float32.
"""

from __future__ import annotations

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from pagetide.ops.cpu.compiled import VECTOR_BYTES, device_function
from pagetide.ops.cpu.tile_code import Tile, data_of

# Rows of a tile: as many as the registers hold sums for, next to what is being multiplied.
TILE_ROWS = 8 if VECTOR_BYTES == 64 else 3


def literals(*values: types.Type) -> list[int] | None:
    """The values that an intrinsic was given as literals; None if Numba has not made them literals yet."""
    return (
        [value.literal_value for value in values]
        if all(isinstance(value, types.Literal) for value in values)
        else None
    )


@intrinsic(prefer_literal=True)
def tile(  # type: ignore[no-untyped-def]
    typing_context,
    rows,
    panels,
    keeps,
    looks_ahead,
    x,
    x_at,
    x_stride,
    w,
    w_at,
    w_stride,
    k,
    out,
    out_at,
    out_stride,
):
    """out[r, p * 16 + lane] = sum over i < k of x[r, i] * w[p, i, lane], added to what is there if keeps;
    if it looks ahead, the panels behind those of w are on their way into the cache afterwards.

    rows, panels, keeps, looks_ahead: literals. Arrays are contiguous, of any shape; _at: the element at
    which the operand begins; x_stride, w_stride,
    out_stride: elements from one row, panel, row to the next. k is even where w is bfloat16.
    """
    found = literals(rows, panels, keeps, looks_ahead)
    if found is None:
        return None

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        x_data, w_data, out_data = (data_of(context, builder, signature.args[i], args[i]) for i in (4, 7, 11))
        Tile(
            builder,
            found,
            (x_data, args[5], args[6]),
            (w_data, args[8], args[9]),
            (out_data, args[12], args[13]),
        ).emit(args[10])
        return context.get_dummy_value()

    index = types.int64
    return types.none(
        rows, panels, keeps, looks_ahead, x, index, index, w, index, index, index, out, index, index
    ), generate


@intrinsic(prefer_literal=True)
def tile_of_pages(  # type: ignore[no-untyped-def]
    typing_context,
    rows,
    panels,
    looks_ahead,
    x,
    x_at,
    x_stride,
    w,
    places,
    places_at,
    ahead_at,
    num_pages,
    w_at,
    w_stride,
    k,
    out,
    out_at,
    out_stride,
):
    """As tile, added to out, for panels that go on in num_pages places of w, k elements in each.

    places int64: from its element places_at on, where pages begin; panels begin w_at elements behind. If it
    looks ahead, the same panels of the pages from ahead_at on are on their way into the cache afterwards.
    """
    found = literals(rows, panels, looks_ahead)
    if found is None:
        return None

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        x_data, w_data, pages, out_data = (
            data_of(context, builder, signature.args[i], args[i]) for i in (3, 6, 7, 14)
        )
        Tile(
            builder,
            [found[0], found[1], True, found[2]],
            (x_data, args[4], args[5]),
            (w_data, args[11], args[12]),
            (out_data, args[15], args[16]),
        ).emit_pages(
            builder.gep(pages, [args[8]]), builder.gep(pages, [args[9]]), args[10], args[11], args[13]
        )
        return context.get_dummy_value()

    index = types.int64
    head = (rows, panels, looks_ahead, x, index, index, w, places)
    return types.none(*head, *[index] * 6, out, index, index), generate


@intrinsic
def depth_of(typing_context, packed):  # type: ignore[no-untyped-def]
    """Elements along k that stand together in a lane of a packed array: 2 of bfloat16, 1 of float32.

    Known when a kernel is compiled.
    """
    depth = 2 if packed.dtype == types.uint16 else 1
    return types.int64(packed), lambda context, builder, signature, args: ir.Constant(ir.IntType(64), depth)


@device_function
def multiply(rows, x, x_at, x_stride, w, w_at, w_stride, k, out, out_at, out_stride):  # type: ignore[no-untyped-def]
    """out = a tile of two panels and `rows` rows, at most TILE_ROWS; whole sizes of tiles are read and
    written.
    """
    if rows == 1:
        tile(1, 2, False, True, x, x_at, x_stride, w, w_at, w_stride, k, out, out_at, out_stride)
    elif rows == 2:
        tile(2, 2, False, True, x, x_at, x_stride, w, w_at, w_stride, k, out, out_at, out_stride)
    elif TILE_ROWS == 3 or rows == 3:
        tile(3, 2, False, True, x, x_at, x_stride, w, w_at, w_stride, k, out, out_at, out_stride)
    elif rows == 4:
        tile(4, 2, False, True, x, x_at, x_stride, w, w_at, w_stride, k, out, out_at, out_stride)
    elif rows <= 6:
        tile(6, 2, False, True, x, x_at, x_stride, w, w_at, w_stride, k, out, out_at, out_stride)
    else:
        tile(8, 2, False, True, x, x_at, x_stride, w, w_at, w_stride, k, out, out_at, out_stride)


@device_function
def multiply_add(rows, x, x_at, x_stride, w, w_at, w_stride, k, out, out_at, out_stride):  # type: ignore[no-untyped-def]
    """As multiply, added to out."""
    if rows == 1:
        tile(1, 2, True, True, x, x_at, x_stride, w, w_at, w_stride, k, out, out_at, out_stride)
    elif rows == 2:
        tile(2, 2, True, True, x, x_at, x_stride, w, w_at, w_stride, k, out, out_at, out_stride)
    elif TILE_ROWS == 3 or rows == 3:
        tile(3, 2, True, True, x, x_at, x_stride, w, w_at, w_stride, k, out, out_at, out_stride)
    elif rows == 4:
        tile(4, 2, True, True, x, x_at, x_stride, w, w_at, w_stride, k, out, out_at, out_stride)
    elif rows <= 6:
        tile(6, 2, True, True, x, x_at, x_stride, w, w_at, w_stride, k, out, out_at, out_stride)
    else:
        tile(8, 2, True, True, x, x_at, x_stride, w, w_at, w_stride, k, out, out_at, out_stride)
