"""The register tile under every matrix product on a CPU: a few rows of x times 16 outputs for each panel of
packed weights.

A matrix [n, k] is packed into panels of 16 outputs. In a panel, bfloat16 elements stand in pairs along k,
which is what the processor's bfloat16 dot product (AVX512_BF16) takes, and one 32-bit word that other
processors widen with a shift and a mask:

   bfloat16  [n / 16, k / 2, 16, 2]          float32  [n / 16, k, 16]

Keys and values in the cache are packed the same way, 16 tokens to a page (see kv_cache/layout.py), so that
attention is made of these tiles too. x is bfloat16 (uint16) where the processor has the dot product, and
float32 otherwise; sums are float32. Written in LLVM's vector types: in Numba's own loops every partial sum
would go through memory, since arrays might overlap.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from pagetide.ops.cpu.compiled import VECTOR_BYTES, device_function

LANES = 16
# Rows of a tile: as many as the registers hold sums for, next to what is being multiplied.
TILE_ROWS = 8 if VECTOR_BYTES == 64 else 3

_FLOAT, _WORD, _HALF, _INDEX = ir.FloatType(), ir.IntType(32), ir.IntType(16), ir.IntType(64)
_FLOATS, _WORDS = ir.VectorType(_FLOAT, LANES), ir.VectorType(_WORD, LANES)


class _BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite lacks."""

    def _to_string(self) -> str:
        return "bfloat"


BFLOAT = _BFloat()
_BFLOATS = ir.VectorType(BFLOAT, 2 * LANES)
_FAST = ("reassoc", "contract")
_CHAINS = 12  # independent sums that hide the latency of a multiplication


def _literals(*values: types.Type) -> list[int] | None:
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
    found = _literals(rows, panels, keeps, looks_ahead)
    if found is None:
        return None

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        x_data, w_data, out_data = (_data(context, builder, signature.args[i], args[i]) for i in (4, 7, 11))
        _Tile(
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


@intrinsic
def depth_of(typing_context, packed):  # type: ignore[no-untyped-def]
    """Elements along k that stand together in a lane of a packed array: 2 of bfloat16, 1 of float32.

    Known when a kernel is compiled.
    """
    depth = 2 if packed.dtype == types.uint16 else 1
    return types.int64(packed), lambda context, builder, signature, args: _int(depth)


def emit_prefetch(builder: ir.IRBuilder, pointer: ir.Value) -> None:
    """Into the second-level cache, for reading."""
    address = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [address, _WORD, _WORD, _WORD])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(
        function, [builder.bitcast(pointer, address), *(ir.Constant(_WORD, value) for value in (0, 1, 1))]
    )


class _Tile:
    """Emits one tile. An operand is (data, first element, stride)."""

    def __init__(self, builder: ir.IRBuilder, shape: list[int], x: Any, w: Any, out: Any):
        self._builder = builder
        self._rows, self._panels, self._keeps, self._looks_ahead = shape
        self._x, self._x_starts = x[0], self._starts(x, self._rows)
        self._w, self._w_starts = w[0], self._starts(w, self._panels)
        self._next_panels = builder.mul(w[2], _int(self._panels))
        self._out, self._out_starts = out[0], self._starts(out, self._rows)
        self._is_packed = w[0].type.pointee == _HALF  # in pairs along k
        self._is_dot = x[0].type.pointee == _HALF
        assert self._is_packed or not self._is_dot, "float32 weights need float32 rows"

    def emit(self, k: ir.Value) -> None:
        builder = self._builder
        sums_each = _CHAINS // (self._rows * self._panels)
        unroll = 4 if sums_each >= 4 else 2 if sums_each >= 2 else 1
        sums = [
            [[self._start(r, p, u) for u in range(unroll)] for p in range(self._panels)]
            for r in range(self._rows)
        ]
        steps = builder.lshr(k, _int(1)) if self._is_packed else k
        whole = builder.and_(steps, _int(-unroll))
        with cgutils.for_range_slice(builder, _int(0), whole, _int(unroll), _INDEX) as (step, _):
            for u in range(unroll):
                self._multiply(builder.add(step, _int(u)), sums, u)
        if unroll > 1:
            with cgutils.for_range_slice(builder, whole, steps, _int(1), _INDEX) as (step, _):
                self._multiply(step, sums, 0)
        for r in range(self._rows):
            for p in range(self._panels):
                total = builder.load(sums[r][p][0])
                for other in sums[r][p][1:]:
                    total = builder.fadd(total, builder.load(other), flags=_FAST)
                builder.store(total, self._out_place(r, p), align=4)

    def _start(self, r: int, p: int, u: int) -> ir.Value:
        builder = self._builder
        is_kept = self._keeps and u == 0
        return cgutils.alloca_once_value(
            builder,
            builder.load(self._out_place(r, p), align=4) if is_kept else ir.Constant(_FLOATS, [0.0] * LANES),
        )

    def _multiply(self, step: ir.Value, sums: list[list[list[ir.Value]]], u: int) -> None:
        """Adds the products of one step along k: an element, or a pair of elements."""
        builder = self._builder
        width = 2 if self._is_packed else 1
        at = builder.mul(step, _int(LANES * width))
        kind = _WORDS if self._is_packed else _FLOATS
        places = [builder.add(start, at) for start in self._w_starts]
        weights = [self._load(self._w, place, kind) for place in places]
        if self._looks_ahead:
            for place in places:
                emit_prefetch(builder, builder.gep(self._w, [builder.add(place, self._next_panels)]))
        if not self._is_dot:
            weights = [self._widened(weight) for weight in weights]
        for r, start in enumerate(self._x_starts):
            first = builder.add(start, builder.mul(step, _int(width)))
            if self._is_dot:
                pair = self._broadcast(self._load(self._x, first, _WORD))
                for p, weight in enumerate(weights):
                    self._dot(sums[r][p][u], pair, weight)
            else:
                for i in range(width):
                    element = self._broadcast(
                        builder.load(builder.gep(self._x, [builder.add(first, _int(i))]))
                    )
                    for p, weight in enumerate(weights):
                        product = builder.fmul(element, weight[i], flags=_FAST)
                        builder.store(
                            builder.fadd(builder.load(sums[r][p][u]), product, flags=_FAST), sums[r][p][u]
                        )

    def _dot(self, total: ir.Value, a: ir.Value, b: ir.Value) -> None:
        """total += the two products of each lane's pair."""
        builder = self._builder
        function = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(_FLOATS, [_FLOATS, _BFLOATS, _BFLOATS]),
            "llvm.x86.avx512bf16.dpbf16ps.512",
        )
        builder.store(
            builder.call(
                function, [builder.load(total), builder.bitcast(a, _BFLOATS), builder.bitcast(b, _BFLOATS)]
            ),
            total,
        )

    def _widened(self, words: ir.Value) -> list[ir.Value]:
        """The elements of each lane as float32: one, or the two of a pair."""
        if not self._is_packed:
            return [words]
        builder = self._builder
        low = builder.shl(words, ir.Constant(_WORDS, [16] * LANES))
        high = builder.and_(words, ir.Constant(_WORDS, [0xFFFF0000] * LANES))
        return [builder.bitcast(low, _FLOATS), builder.bitcast(high, _FLOATS)]

    def _load(self, data: ir.Value, place: ir.Value, kind: ir.Type) -> ir.Value:
        builder = self._builder
        return builder.load(
            builder.bitcast(builder.gep(data, [place]), kind.as_pointer()),
            align=2 if data.type.pointee == _HALF else 4,
        )

    def _out_place(self, r: int, p: int) -> ir.Value:
        builder = self._builder
        place = builder.add(self._out_starts[r], _int(p * LANES))
        return builder.bitcast(builder.gep(self._out, [place]), _FLOATS.as_pointer())

    def _starts(self, operand: Any, count: int) -> list[ir.Value]:
        _, at, stride = operand
        return [self._builder.add(at, self._builder.mul(stride, _int(i))) for i in range(count)]

    def _broadcast(self, element: ir.Value) -> ir.Value:
        builder = self._builder
        vector = ir.VectorType(element.type, LANES)
        one = builder.insert_element(ir.Constant(vector, ir.Undefined), element, ir.Constant(_WORD, 0))
        return builder.shuffle_vector(
            one, ir.Constant(vector, ir.Undefined), ir.Constant(_WORDS, [0] * LANES)
        )


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


def _int(value: int) -> ir.Constant:
    return ir.Constant(_INDEX, value)


def _data(context: Any, builder: ir.IRBuilder, kind: Any, array: ir.Value) -> ir.Value:
    """The address of a contiguous array's first element."""
    assert kind.layout == "C", kind
    return context.make_array(kind)(context, builder, array).data
