"""The register tile of quantized matrices: a few rows of 8-bit integers times 32 outputs, exact sums in
32-bit integers within each group of inputs, which scales then turn into floats.

Four elements along k stand in each 32-bit lane, which is what the processor's byte dot product
(AVX512_VNNI) takes; other processors multiply 16-bit halves (see codes.py for the layout).
"""

from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from pagetide.ops.cpu.compiled import HAS_BYTE_DOT, HAS_SHORT_DOT, HAS_WIDE_SHORTS
from pagetide.ops.cpu.lanes import FAST, FLOATS, HALF, INDEX, WORD, WORDS, int_constant, spread
from pagetide.ops.cpu.tile_code import LANES, data_of, emit_prefetch

PANELS = 2
SCALE_BYTES = 2 * LANES  # of a record: 16 of bfloat16
STEP_BYTES = 4 * LANES  # of codes that are loaded at a time
_SHORTS = ir.VectorType(HALF, 2 * LANES)
# Rows of the tiles there are, by digits: as many as the registers hold sums and totals for.
_SIZES = {1: (1, 2, 4, 6), 2: (1, 2, 4)}
CODE_ROWS, WIDE_ROWS = _SIZES[1][-1], _SIZES[2][-1]


def steps_of(bits: int) -> int:
    """Elements along k in a step."""
    return 32 // bits


def header_bytes(bits: int) -> int:
    """What stands before a group's codes: scales, and with 4 bits minima."""
    return SCALE_BYTES if bits == 8 else 2 * SCALE_BYTES


@intrinsic
def tile_of_codes(  # type: ignore[no-untyped-def]
    typing_context,
    rows,
    bits,
    digits,
    x,
    x_at,
    x_stride,
    scales,
    scales_at,
    scales_stride,
    w,
    w_at,
    ahead,
    num_groups,
    group,
    out,
    out_at,
    out_stride,
):
    """out[r, p * 16 + lane] += the sum over groups of scale(x) * (scale(w) * sum of codes + minimum(w) *
    sum of x).

    rows: at most CODE_ROWS, WIDE_ROWS with two digits; the next larger tile is read and written. x int8,
    x_stride from one digit of a row to the next, and on to the next row; scales float32, two for each group
    of x (codes.encode_row); w uint8, from w_at on the records of all groups, of 16 outputs and the next 16 in
    turn; what is `ahead` bytes further is on its way into the cache afterwards.
    """

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        def place(number: int) -> ir.Value:
            data = data_of(context, builder, signature.args[number], args[number])
            return builder.gep(data, [args[number + 1]])

        def emit(num_rows: int, num_bits: int, num_digits: int) -> None:
            tile = _Tile(builder, num_rows, num_bits, num_digits)
            tile.x, tile.x_stride = place(3), args[5]
            tile.scales, tile.scales_stride = place(6), args[8]
            tile.w, tile.ahead, tile.group = place(9), args[11], args[13]
            tile.emit(args[12], place(14), args[16])

        for num_digits, sizes in _SIZES.items():
            for num_bits in (8, 4):
                is_form = builder.and_(
                    builder.icmp_signed("==", args[1], int_constant(num_bits)),
                    builder.icmp_signed("==", args[2], int_constant(num_digits)),
                )
                with builder.if_then(is_form):
                    for smaller, size in zip((0, *sizes), sizes, strict=False):
                        fits = builder.icmp_signed(">", args[0], int_constant(smaller))
                        if size != sizes[-1]:
                            is_enough = builder.icmp_signed("<=", args[0], int_constant(size))
                            fits = builder.and_(fits, is_enough)
                        with builder.if_then(fits):
                            emit(size, num_bits, num_digits)
        return context.get_dummy_value()

    i = types.int64
    return types.none(i, i, i, x, i, i, scales, i, i, w, i, i, i, i, out, i, i), generate


class _Tile:
    """Emits one tile; its operands are pointers to their first elements, and strides."""

    x: ir.Value
    x_stride: ir.Value
    scales: ir.Value
    scales_stride: ir.Value
    w: ir.Value
    ahead: ir.Value
    group: ir.Value

    def __init__(self, builder: ir.IRBuilder, rows: int, bits: int, digits: int):
        self._builder, self._rows, self._bits, self._digits = builder, rows, bits, digits

    def emit(self, num_groups: ir.Value, out: ir.Value, out_stride: ir.Value) -> None:
        builder = self._builder
        outs = [
            [
                self._pointer(
                    out,
                    builder.add(builder.mul(out_stride, int_constant(r)), int_constant(p * LANES)),
                    FLOATS,
                )
                for p in range(PANELS)
            ]
            for r in range(self._rows)
        ]
        totals = [
            [cgutils.alloca_once_value(builder, builder.load(each, align=4)) for each in row] for row in outs
        ]
        sums = [
            [[cgutils.alloca_once(builder, WORDS) for _ in range(self._digits)] for _ in row] for row in outs
        ]
        steps = builder.udiv(self.group, int_constant(steps_of(self._bits)))
        record = builder.add(
            int_constant(header_bytes(self._bits)), builder.mul(steps, int_constant(STEP_BYTES))
        )
        with cgutils.for_range(builder, num_groups, intp=INDEX) as loop:
            first = builder.gep(self.w, [builder.mul(builder.mul(loop.index, record), int_constant(PANELS))])
            records = [first, builder.gep(first, [record])]
            self._add_products(loop.index, records, steps, sums)
            self._add_group(loop.index, records, sums, totals)
        for row, places in zip(totals, outs, strict=True):
            for total, each in zip(row, places, strict=True):
                builder.store(builder.load(total), each, align=4)

    def _add_products(
        self, group: ir.Value, records: list[ir.Value], steps: ir.Value, sums: list[list[list[ir.Value]]]
    ) -> None:
        """The sums of codes times each digit of x in one group; with 8 bits they begin at -128 times the sum
        of x, since codes are 128 larger than what they stand for.
        """
        builder, size = self._builder, steps_of(self._bits)
        for r, row in enumerate(sums):
            start = nothing = ir.Constant(WORDS, [0] * LANES)
            if self._bits == 8:
                place = self._pointer(self._scale(r, group), int_constant(1), WORD)
                start = spread(builder, builder.load(place))
            for panel in row:
                for digit, each in enumerate(panel):
                    builder.store(nothing if digit else start, each)
        first = builder.mul(group, self.group)
        with cgutils.for_range(builder, steps, intp=INDEX) as loop:
            at = builder.add(
                int_constant(header_bytes(self._bits)), builder.mul(loop.index, int_constant(STEP_BYTES))
            )
            codes = []
            for record in records:
                words = builder.load(self._pointer(record, at, WORDS), align=1)
                emit_prefetch(builder, builder.gep(record, [builder.add(at, self.ahead)]))
                codes.append([words] if self._bits == 8 else self._nibbles(words))
            element = builder.add(first, builder.mul(loop.index, int_constant(size)))
            for r, row in enumerate(sums):
                for digit in range(self._digits):
                    number = int_constant(r * self._digits + digit)
                    place = builder.add(builder.mul(self.x_stride, number), element)
                    for half in range(len(codes[0])):
                        own = self._pointer(self.x, builder.add(place, int_constant(4 * half)), WORD)
                        four = spread(builder, builder.load(own, align=1))
                        for p, panel in enumerate(row):
                            total = byte_dot(builder, builder.load(panel[digit]), codes[p][half], four)
                            builder.store(total, panel[digit])

    def _add_group(
        self,
        group: ir.Value,
        records: list[ir.Value],
        sums: list[list[list[ir.Value]]],
        totals: list[list[ir.Value]],
    ) -> None:
        """Scales what one group adds."""
        builder = self._builder
        for p, record in enumerate(records):
            scale = self._halves(record, 0)
            minimum = self._halves(record, SCALE_BYTES) if self._bits == 4 else None
            for r in range(self._rows):
                own = self._scale(r, group)
                factor = builder.fmul(scale, spread(builder, builder.load(own)), flags=FAST)
                whole = joined_digits(builder, [builder.load(digit) for digit in sums[r][p]])
                product = builder.fmul(builder.sitofp(whole, FLOATS), factor, flags=FAST)
                total = builder.fadd(builder.load(totals[r][p]), product, flags=FAST)
                if minimum is not None:
                    sum_of_x = spread(builder, builder.load(builder.gep(own, [int_constant(1)])))
                    total = builder.fadd(total, builder.fmul(minimum, sum_of_x, flags=FAST), flags=FAST)
                builder.store(total, totals[r][p])

    def _scale(self, r: int, group: ir.Value) -> ir.Value:
        """Where the two floats of row r's group are."""
        builder = self._builder
        row = builder.mul(self.scales_stride, int_constant(r))
        return builder.gep(self.scales, [builder.add(row, builder.mul(group, int_constant(2)))])

    def _pointer(self, data: ir.Value, at: ir.Value, kind: ir.Type) -> ir.Value:
        return self._builder.bitcast(self._builder.gep(data, [at]), kind.as_pointer())

    def _halves(self, record: ir.Value, offset: int) -> ir.Value:
        """16 values of bfloat16 as floats."""
        builder = self._builder
        halves = builder.load(
            self._pointer(record, int_constant(offset), ir.VectorType(HALF, LANES)), align=1
        )
        return builder.bitcast(
            builder.shl(builder.zext(halves, WORDS), ir.Constant(WORDS, [16] * LANES)), FLOATS
        )

    def _nibbles(self, words: ir.Value) -> list[ir.Value]:
        """The lower and the upper four bits of each byte, as bytes."""
        builder = self._builder
        mask = ir.Constant(WORDS, [0x0F0F0F0F] * LANES)
        upper = builder.lshr(words, ir.Constant(WORDS, [4] * LANES))
        return [builder.and_(words, mask), builder.and_(upper, mask)]


def byte_dot(builder: ir.IRBuilder, total: ir.Value, codes: ir.Value, x: ir.Value) -> ir.Value:
    """total + the four products of each lane's unsigned codes and signed x."""
    if HAS_BYTE_DOT:
        kind = ir.FunctionType(WORDS, [WORDS, WORDS, WORDS])
        name = "llvm.x86.avx512.vpdpbusd.512"
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [total, codes, x])
    eight = ir.Constant(_SHORTS, [8] * 2 * LANES)
    codes, x = builder.bitcast(codes, _SHORTS), builder.bitcast(x, _SHORTS)
    low = builder.and_(codes, ir.Constant(_SHORTS, [0xFF] * 2 * LANES))
    even = _dot_of_halves(builder, low, builder.ashr(builder.shl(x, eight), eight))
    odd = _dot_of_halves(builder, builder.lshr(codes, eight), builder.ashr(x, eight))
    return builder.add(total, builder.add(even, odd))


def _dot_of_halves(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    """The sum of each lane's two products of 16-bit integers."""
    if not HAS_SHORT_DOT:
        sixteen = ir.Constant(WORDS, [16] * LANES)
        a, b = builder.bitcast(a, WORDS), builder.bitcast(b, WORDS)
        low = (builder.ashr(builder.shl(value, sixteen), sixteen) for value in (a, b))
        high = (builder.ashr(value, sixteen) for value in (a, b))
        return builder.add(builder.mul(*low), builder.mul(*high))
    lanes = LANES if HAS_WIDE_SHORTS else LANES // 2
    name = "llvm.x86.avx512.pmaddw.d.512" if lanes == LANES else "llvm.x86.avx2.pmadd.wd"
    words, shorts = ir.VectorType(WORD, lanes), ir.VectorType(HALF, 2 * lanes)
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(words, [shorts, shorts]), name)
    if lanes == LANES:
        return builder.call(function, [a, b])

    def part(vector: ir.Value, start: int) -> ir.Value:
        places = ir.Constant(ir.VectorType(WORD, 2 * lanes), list(range(start, start + 2 * lanes)))
        return builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), places)

    parts = [builder.call(function, [part(a, start), part(b, start)]) for start in (0, 2 * lanes)]
    return builder.shuffle_vector(*parts, ir.Constant(WORDS, list(range(LANES))))


def joined_digits(builder: ir.IRBuilder, digits: list[ir.Value]) -> ir.Value:
    """The sum that two digits' sums make, of which the second is worth 256 times the first; or the one."""
    if len(digits) == 1:
        return digits[0]
    return builder.add(digits[0], builder.shl(digits[1], ir.Constant(WORDS, [8] * LANES)))
