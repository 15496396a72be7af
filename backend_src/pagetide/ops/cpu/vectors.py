"""Two inner loops of attention as vector code: Numba's own loops store every partial sum, since arrays might overlap.

Written in LLVM's vector types, which it maps to whatever the processor has (AVX2, AVX512). Sizes are known when a loop is compiled;
cache blocks may be float32 or bfloat16 (uint16).
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

_FLOAT, _WORD, _HALF, _INDEX = ir.FloatType(), ir.IntType(32), ir.IntType(16), ir.IntType(64)
_FAST = ("reassoc", "contract")


def make_scores(group: int, head_dim: int, block_size: int) -> Any:
    """scores(queries, row, keys, out): out[g, at] = sum over i of queries[row + g, i] * keys[i, at] for the group's rows g.

    queries float32 [rows, head_dim]; keys [head_dim * block_size]; out float32 [group, block_size].
    """

    @intrinsic
    def scores(typing_context, queries, row, keys, out):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
            query, key, target = (_data(context, builder, signature.args[i], args[i]) for i in (0, 2, 3))
            vector = ir.VectorType(_FLOAT, block_size)
            sums = [cgutils.alloca_once_value(builder, ir.Constant(vector, [0.0] * block_size)) for _ in range(group)]
            first = builder.mul(args[1], ir.Constant(_INDEX, head_dim))
            with cgutils.for_range(builder, ir.Constant(_INDEX, head_dim)) as loop:
                column = _load_wide(builder, key, builder.mul(loop.index, ir.Constant(_INDEX, block_size)), block_size)
                for g, total in enumerate(sums):
                    at = builder.add(builder.add(first, ir.Constant(_INDEX, g * head_dim)), loop.index)
                    _add_product(builder, total, _broadcast(builder, builder.load(builder.gep(query, [at])), block_size), column)
            for g, total in enumerate(sums):
                _store(builder, target, ir.Constant(_INDEX, g * block_size), builder.load(total))
            return context.get_dummy_value()

        return types.none(queries, types.int64, keys, out), generate

    return scores


def make_weighted_sum(group: int, head_dim: int, block_size: int) -> Any:
    """weighted_sum(weights, values, low, high, row, sums): sums[row + g, i] += sum over low <= at < high of weights[g, at] * values[at, i].

    weights float32 [group, block_size]; values [block_size * head_dim]; sums float32 [rows, head_dim]. Nothing outside [low, high) is read.
    """
    width = next(size for size in (16, 8, 4, 2, 1) if head_dim % size == 0)

    @intrinsic
    def weighted_sum(typing_context, weights, values, low, high, row, sums):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
            weight, value, target = (_data(context, builder, signature.args[i], args[i]) for i in (0, 1, 5))
            first = builder.mul(args[4], ir.Constant(_INDEX, head_dim))
            for chunk in range(0, head_dim, width):
                places = [builder.add(first, ir.Constant(_INDEX, g * head_dim + chunk)) for g in range(group)]
                totals = [cgutils.alloca_once_value(builder, _load_wide(builder, target, place, width)) for place in places]
                with cgutils.for_range_slice(builder, args[2], args[3], ir.Constant(_INDEX, 1), _INDEX) as (at, _):
                    place = builder.add(builder.mul(at, ir.Constant(_INDEX, head_dim)), ir.Constant(_INDEX, chunk))
                    line = _load_wide(builder, value, place, width)
                    for g, total in enumerate(totals):
                        element = builder.load(builder.gep(weight, [builder.add(at, ir.Constant(_INDEX, g * block_size))]))
                        _add_product(builder, total, _broadcast(builder, element, width), line)
                for place, total in zip(places, totals, strict=True):
                    _store(builder, target, place, builder.load(total))
            return context.get_dummy_value()

        return types.none(weights, values, types.int64, types.int64, types.int64, sums), generate

    return weighted_sum


def _data(context: Any, builder: ir.IRBuilder, kind: Any, array: ir.Value) -> ir.Value:
    """The address of a contiguous array's first element."""
    assert kind.layout == "C", kind
    return context.make_array(kind)(context, builder, array).data


def _load_wide(builder: ir.IRBuilder, data: ir.Value, place: ir.Value, width: int) -> ir.Value:
    """width elements from data[place] on, as float32."""
    is_half = data.type.pointee == _HALF
    vector = ir.VectorType(_HALF if is_half else _FLOAT, width)
    loaded = builder.load(builder.bitcast(builder.gep(data, [place]), vector.as_pointer()), align=2 if is_half else 4)
    if not is_half:
        return loaded
    words = ir.VectorType(_WORD, width)
    shifted = builder.shl(builder.zext(loaded, words), ir.Constant(words, [16] * width))
    return builder.bitcast(shifted, ir.VectorType(_FLOAT, width))


def _store(builder: ir.IRBuilder, data: ir.Value, place: ir.Value, value: ir.Value) -> None:
    builder.store(value, builder.bitcast(builder.gep(data, [place]), value.type.as_pointer()), align=4)


def _broadcast(builder: ir.IRBuilder, element: ir.Value, width: int) -> ir.Value:
    vector = ir.VectorType(_FLOAT, width)
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), element, ir.Constant(_WORD, 0))
    return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), ir.Constant(ir.VectorType(_WORD, width), [0] * width))


def _add_product(builder: ir.IRBuilder, total: ir.Value, a: ir.Value, b: ir.Value) -> None:
    """total (a variable) += a * b"""
    builder.store(builder.fadd(builder.load(total), builder.fmul(a, b, flags=_FAST), flags=_FAST), total)
