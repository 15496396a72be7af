"""The tile of processors that multiply whole matrices (Intel AMX): up to 32 rows of bfloat16 times 32
outputs, in registers of 16 rows of 64 bytes.

Panels (tiles.py) are what the processor takes: 16 pairs of elements along k of 16 outputs fill a register.
Each sum is made of as many products along k as registers hold at a time, in the processor's order, however
many rows there are, so that a row's result does not depend on its neighbours.

https://www.intel.com/content/www/us/en/docs/intrinsics-guide, "AMX"; Linux lends the registers to processes
that ask for them (https://docs.kernel.org/arch/x86/xstate.html).
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from pagetide.ops.cpu.lanes import HALF, INDEX, int_constant
from pagetide.ops.cpu.tile_code import LANES, data_of, emit_prefetch
from pagetide.ops.cpu.tiles import literals

MATRIX_DEPTH = 2 * LANES  # elements along k in a register
MATRIX_ROWS = 2 * LANES
_BYTE = ir.IntType(8)
_ROW_BYTES = 4 * LANES
_SUMS, _ROWS, _WEIGHTS = 0, 4, 6  # numbers of the registers: 2 x 2 of sums, 2 of x, 2 of panels


@intrinsic
def begin_tiles(typing_context, num_rows, depth):  # type: ignore[no-untyped-def]
    """Prepares this thread's registers for tiles of so many rows in all, and of `depth` elements along k at a
    time: even, at most MATRIX_DEPTH. They are the thread's until end_tiles().
    """

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        def at_most(value: ir.Value, limit: int) -> ir.Value:
            is_less = builder.icmp_signed("<", value, int_constant(limit))
            return builder.select(is_less, value, int_constant(limit))

        below = builder.sub(args[0], int_constant(LANES))
        is_any = builder.icmp_signed(">", below, int_constant(0))
        first = at_most(args[0], LANES)
        second = builder.select(is_any, at_most(below, LANES), int_constant(1))
        pairs = builder.lshr(args[1], int_constant(1))
        row_bytes, x_bytes = int_constant(_ROW_BYTES), builder.mul(args[1], int_constant(2))
        registers = [
            *((rows, row_bytes) for rows in (first, first, second, second)),
            *((rows, x_bytes) for rows in (first, second)),
            *((pairs, row_bytes) for _ in range(2)),
        ]
        # Palette 1; each register's bytes of a row from byte 16 on, two bytes each; its rows from byte 48 on.
        start = ir.Constant(ir.ArrayType(_BYTE, 64), [ir.Constant(_BYTE, int(i == 0)) for i in range(64)])
        memory = builder.bitcast(cgutils.alloca_once(builder, start.type), _BYTE.as_pointer())
        builder.store(start, builder.bitcast(memory, start.type.as_pointer()))
        for number, (rows, size) in enumerate(registers):
            builder.store(builder.trunc(size, _BYTE), builder.gep(memory, [int_constant(16 + 2 * number)]))
            builder.store(builder.trunc(rows, _BYTE), builder.gep(memory, [int_constant(48 + number)]))
        _call(builder, "ldtilecfg", memory)
        return context.get_dummy_value()

    return types.none(types.int64, types.int64), generate


@intrinsic
def end_tiles(typing_context):  # type: ignore[no-untyped-def]
    """Gives the registers back, so that nobody has to keep what is in them."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        _call(builder, "tilerelease")
        return context.get_dummy_value()

    return types.none(), generate


@intrinsic(prefer_literal=True)
def matrix_tile(  # type: ignore[no-untyped-def]
    typing_context,
    blocks,
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
    """As tiles.tile, of two panels and one or two blocks of 16 rows, or of what begin_tiles() was told, which
    is what is read and written.

    blocks, keeps, looks_ahead: literals. k: a multiple of the depth.
    """
    found = literals(blocks, keeps, looks_ahead)
    if found is None:
        return None

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        x_data, w_data, out_data = (data_of(context, builder, signature.args[i], args[i]) for i in (3, 6, 10))
        tile = _MatrixTile(builder, found[0], (x_data, *args[4:6]), args[8], (out_data, *args[11:13]))
        tile.start(bool(found[1]))
        tile.go_along(args[9], w_data, args[7], bool(found[2]))
        tile.store()
        return context.get_dummy_value()

    index = types.int64
    head = (blocks, keeps, looks_ahead, x, index, index, w, index, index, index)
    return types.none(*head, out, index, index), generate


@intrinsic(prefer_literal=True)
def matrix_tile_of_pages(  # type: ignore[no-untyped-def]
    typing_context,
    blocks,
    x,
    x_at,
    x_stride,
    w,
    places,
    places_at,
    num_pages,
    w_at,
    w_stride,
    depth,
    out,
    out_at,
    out_stride,
):
    """As tiles.tile_of_pages, of two panels and one or two blocks of rows; of each page one depth."""
    found = literals(blocks)
    if found is None:
        return None

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        x_data, w_data, pages, out_data = (
            data_of(context, builder, signature.args[i], args[i]) for i in (1, 4, 5, 11)
        )
        tile = _MatrixTile(builder, found[0], (x_data, *args[2:4]), args[9], (out_data, *args[12:14]))
        tile.start(True)
        first = builder.gep(pages, [args[6]])
        with cgutils.for_range(builder, args[7], intp=INDEX) as loop:
            place = builder.add(builder.load(builder.gep(first, [loop.index])), args[8])
            tile.multiply(builder.mul(loop.index, args[10]), w_data, place)
        tile.store()
        return context.get_dummy_value()

    index = types.int64
    head = (blocks, x, index, index, w, places)
    return types.none(*head, *[index] * 5, out, index, index), generate


class _MatrixTile:
    """Emits one tile. x, out: (data, first element, stride); w_stride: elements from panel to panel."""

    def __init__(self, builder: ir.IRBuilder, blocks: int, x: Any, w_stride: ir.Value, out: Any):
        assert x[0].type.pointee == HALF, "rows are bfloat16, as the panels"
        self._builder, self._blocks = builder, blocks
        self._x, self._x_stride = self._bytes(x[0], x[1]), builder.mul(x[2], int_constant(2))
        self._w_stride = w_stride
        self._out_stride = builder.mul(out[2], int_constant(4))
        first = self._bytes(out[0], out[1])
        self._sums = [
            (_number(_SUMS + 2 * b + p), self._ahead(first, self._block(b, self._out_stride), p * _ROW_BYTES))
            for b in range(blocks)
            for p in range(2)
        ]

    def start(self, keeps: bool) -> None:
        for register, place in self._sums:
            if keeps:
                _call(self._builder, "tileloadd64", register, place, self._out_stride)
            else:
                _call(self._builder, "tilezero", register)

    def go_along(self, k: ir.Value, w_data: ir.Value, w_at: ir.Value, looks_ahead: bool) -> None:
        """Of k elements that stand one behind the other."""
        builder = self._builder
        steps = cgutils.for_range_slice(builder, int_constant(0), k, int_constant(MATRIX_DEPTH), INDEX)
        with steps as (at, _):
            place = builder.add(w_at, builder.mul(at, int_constant(LANES)))
            self.multiply(at, w_data, place)
            for p in range(2 if looks_ahead else 0):
                ahead = builder.add(place, builder.mul(self._w_stride, int_constant(2 + p)))
                first = self._bytes(w_data, ahead)
                for line in range(LANES):
                    emit_prefetch(builder, self._ahead(first, line * _ROW_BYTES))

    def multiply(self, x_at: ir.Value, w_data: ir.Value, w_at: ir.Value) -> None:
        """Adds the products of one depth, whose elements of the first panel begin at w_at."""
        builder = self._builder
        for p in range(2):
            place = builder.add(w_at, builder.mul(self._w_stride, int_constant(p)))
            first = self._bytes(w_data, place)
            _call(builder, "tileloadd64", _number(_WEIGHTS + p), first, int_constant(_ROW_BYTES))
        for b in range(self._blocks):
            row = self._ahead(self._x, self._block(b, self._x_stride), builder.mul(x_at, int_constant(2)))
            _call(builder, "tileloadd64", _number(_ROWS + b), row, self._x_stride)
            for p in range(2):
                numbers = (_SUMS + 2 * b + p, _ROWS + b, _WEIGHTS + p)
                _call(builder, "tdpbf16ps", *(_number(number) for number in numbers))

    def store(self) -> None:
        for register, place in self._sums:
            _call(self._builder, "tilestored64", register, place, self._out_stride)

    def _block(self, number: int, stride: ir.Value) -> ir.Value:
        """Bytes from the first row to the first one of this block."""
        return self._builder.mul(stride, int_constant(number * LANES))

    def _bytes(self, data: ir.Value, at: ir.Value) -> ir.Value:
        return self._builder.bitcast(self._builder.gep(data, [at]), _BYTE.as_pointer())

    def _ahead(self, place: ir.Value, *steps: ir.Value | int) -> ir.Value:
        for step in steps:
            offset = int_constant(step) if isinstance(step, int) else step
            place = self._builder.gep(place, [offset])
        return place


def _number(register: int) -> ir.Constant:
    return ir.Constant(_BYTE, register)


def _call(builder: ir.IRBuilder, name: str, *arguments: ir.Value) -> None:
    """One of LLVM's instructions for these registers."""
    kind = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}"), arguments)
