"""Emits the tile of tiles.py in LLVM's vector types: in Numba's own loops every partial sum would go through
memory, since arrays might overlap.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils

LANES = 16
_FLOAT, _WORD, _HALF, _INDEX = ir.FloatType(), ir.IntType(32), ir.IntType(16), ir.IntType(64)
_FLOATS, _WORDS = ir.VectorType(_FLOAT, LANES), ir.VectorType(_WORD, LANES)


class _BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite lacks."""

    def _to_string(self) -> str:
        return "bfloat"


BFLOAT = _BFloat()
_BFLOATS = ir.VectorType(BFLOAT, 2 * LANES)
_FUSED = ("contract",)  # into one instruction; never in another order
_STEPS = 8  # along k of one row and panel, between two jumps


def data_of(context: Any, builder: ir.IRBuilder, kind: Any, array: ir.Value) -> ir.Value:
    """The address of a contiguous array's first element."""
    assert kind.layout == "C", kind
    return context.make_array(kind)(context, builder, array).data


def emit_prefetch(builder: ir.IRBuilder, pointer: ir.Value) -> None:
    """Into the second-level cache, for reading."""
    address = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [address, _WORD, _WORD, _WORD])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(
        function, [builder.bitcast(pointer, address), *(ir.Constant(_WORD, value) for value in (0, 2, 1))]
    )


class _Walk:
    """Places one stride after the other (rows or panels) that move on together through the memory.

    Their addresses are one register for every four, plus the stride times 0, 1, 2 or 3, which is what an
    instruction can add: as the compiler sees the strides, it would multiply them anew in every step.
    """

    def __init__(self, builder: ir.IRBuilder, data: ir.Value, at: ir.Value, stride: ir.Value, count: int):
        self._builder = builder
        self._size = _int(2 if data.type.pointee == _HALF else 4)
        self._data = builder.ptrtoint(data, _INDEX)
        self._stride = _opaque(builder, builder.mul(stride, self._size))
        self._three = _opaque(builder, builder.mul(self._stride, _int(3)))
        self._heads = [cgutils.alloca_once(builder, _INDEX) for _ in range((count + 3) // 4)]
        self.start(at)

    def start(self, at: ir.Value) -> None:
        """Goes to the element `at`."""
        builder = self._builder
        first = builder.add(self._data, builder.mul(at, self._size))
        for i, head in enumerate(self._heads):
            own = builder.add(first, builder.mul(self._stride, _int(4 * i)))
            builder.store(_opaque(builder, own), head)

    def place(self, number: int, kind: ir.Type, offset: int = 0) -> ir.Value:
        """Where place `number` is now, and some bytes on, as a pointer to this type."""
        builder = self._builder
        address = builder.load(self._heads[number // 4])
        ahead = number % 4
        if ahead == 3:
            address = builder.add(address, self._three)
        elif ahead:
            address = builder.add(address, builder.mul(self._stride, _int(ahead)))
        return builder.inttoptr(builder.add(address, _int(offset)), kind.as_pointer())

    def advance(self, num_bytes: int) -> None:
        for head in self._heads:
            self._builder.store(self._builder.add(self._builder.load(head), _int(num_bytes)), head)


def _opaque(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """The value in a register, without what the compiler knows about it."""
    return builder.asm(ir.FunctionType(value.type, [value.type]), "", "=r,0", [value], False)


class Tile:
    """Emits one tile. An operand is (data, first element, stride)."""

    def __init__(self, builder: ir.IRBuilder, shape: list[int], x: Any, w: Any, out: Any):
        self._builder = builder
        self._rows, self._panels, self._keeps, self._looks_ahead = shape
        self._x, self._w = _Walk(builder, *x, self._rows), _Walk(builder, *w, self._panels)
        self._out, self._out_at, self._out_stride = out
        self._is_packed = w[0].type.pointee == _HALF  # in pairs along k
        self._is_dot = x[0].type.pointee == _HALF
        assert self._is_packed or not self._is_dot, "float32 weights need float32 rows"
        if self._looks_ahead:
            next_panels = builder.add(w[1], builder.mul(w[2], _int(self._panels)))
            self._ahead = _Walk(builder, w[0], next_panels, w[2], self._panels)
        self._unroll = max(1, min(4, _STEPS // (self._rows * self._panels)))
        # One for each element, whatever the tile's size: a row's result does not depend on its neighbours.
        self._sums = [[self._start(r, p) for p in range(self._panels)] for r in range(self._rows)]

    def emit(self, k: ir.Value) -> None:
        """Of k elements that stand one behind the other."""
        self._go_along(k)
        self._store()

    def emit_pages(
        self, places: ir.Value, ahead: ir.Value, num_pages: ir.Value, at: ir.Value, k: ir.Value
    ) -> None:
        """Of k elements of each page; places, ahead: pointers to their first elements and to those of what
        is looked ahead for.
        """
        builder = self._builder
        with cgutils.for_range(builder, num_pages, intp=_INDEX) as loop:
            walks = [(self._w, places), *([(self._ahead, ahead)] if self._looks_ahead else [])]
            for walk, pages in walks:
                walk.start(builder.add(builder.load(builder.gep(pages, [loop.index])), at))
            self._go_along(k)
        self._store()

    def _go_along(self, k: ir.Value) -> None:
        builder, unroll = self._builder, self._unroll
        steps = builder.lshr(k, _int(1)) if self._is_packed else k
        whole = builder.and_(steps, _int(-unroll))
        with cgutils.for_range_slice(builder, _int(0), whole, _int(unroll), _INDEX):
            for u in range(unroll):
                self._multiply(u)
            self._advance(unroll)
        if unroll > 1:
            with cgutils.for_range_slice(builder, whole, steps, _int(1), _INDEX):
                self._multiply(0)
                self._advance(1)

    def _store(self) -> None:
        builder = self._builder
        for r in range(self._rows):
            for p in range(self._panels):
                builder.store(builder.load(self._sums[r][p]), self._out_place(r, p), align=4)

    @property
    def _x_bytes(self) -> int:
        """Of one step along k: an element, or a pair of elements."""
        return (2 if self._is_packed else 1) * (2 if self._is_dot else 4)

    def _advance(self, steps: int) -> None:
        self._x.advance(self._x_bytes * steps)
        self._w.advance(4 * LANES * steps)
        if self._looks_ahead:
            self._ahead.advance(4 * LANES * steps)

    def _start(self, r: int, p: int) -> ir.Value:
        builder, zeros = self._builder, ir.Constant(_FLOATS, [0.0] * LANES)
        first = builder.load(self._out_place(r, p), align=4) if self._keeps else zeros
        return cgutils.alloca_once_value(builder, first)

    def _multiply(self, step: int) -> None:
        """Adds the products of the step with this number from where the walks are."""
        builder, sums = self._builder, self._sums
        offset = 4 * LANES * step
        kind, align = (_WORDS, 2) if self._is_packed else (_FLOATS, 4)
        weights = [builder.load(self._w.place(p, kind, offset), align=align) for p in range(self._panels)]
        if self._looks_ahead:
            for p in range(self._panels):
                emit_prefetch(builder, self._ahead.place(p, ir.IntType(8), offset))
        if not self._is_dot:
            weights = [self._widened(weight) for weight in weights]
        for r in range(self._rows):
            first = self._x_bytes * step
            if self._is_dot:
                pair = self._broadcast(builder.load(self._x.place(r, _WORD, first), align=2))
                for p, weight in enumerate(weights):
                    self._dot(sums[r][p], pair, weight)
            else:
                for i in range(2 if self._is_packed else 1):
                    element = self._broadcast(builder.load(self._x.place(r, _FLOAT, first + 4 * i), align=4))
                    for p, weight in enumerate(weights):
                        product = builder.fmul(element, weight[i], flags=_FUSED)
                        total = builder.fadd(builder.load(sums[r][p]), product, flags=_FUSED)
                        builder.store(total, sums[r][p])

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

    def _out_place(self, r: int, p: int) -> ir.Value:
        builder = self._builder
        row = builder.add(self._out_at, builder.mul(self._out_stride, _int(r)))
        place = builder.add(row, _int(p * LANES))
        return builder.bitcast(builder.gep(self._out, [place]), _FLOATS.as_pointer())

    def _broadcast(self, element: ir.Value) -> ir.Value:
        builder = self._builder
        vector = ir.VectorType(element.type, LANES)
        one = builder.insert_element(ir.Constant(vector, ir.Undefined), element, ir.Constant(_WORD, 0))
        return builder.shuffle_vector(
            one, ir.Constant(vector, ir.Undefined), ir.Constant(_WORDS, [0] * LANES)
        )


def _int(value: int) -> ir.Constant:
    return ir.Constant(_INDEX, value)
