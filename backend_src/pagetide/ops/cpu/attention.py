"""Paged attention straight on the packed KV blocks, with online softmax (arXiv:1805.02867) over spans of
128 keys.

A task is one (sequence, KV head, tile of queries, range of keys): all query heads that share the KV head
are rows of one matrix, so that keys and values are read once for the whole group. Long contexts of single
queries are split over several tasks, whose parts are merged afterwards (Flash-Decoding,
https://pytorch.org/blog/flash-decoding). Whoever computes them, sums are made of segments of 512 keys, one
after the other: a query's result is the same to the last bit, whatever its step has besides. So a segment
that several sequences share, as those with a common prefix do, is a task of its own, in which all their
queries are rows (Hydragen, arXiv:2402.05099).

Pages lie anywhere in memory, so the processor cannot guess the next ones: a span's values are asked for
while its keys are multiplied, and the next span's keys while its values are.
"""

from __future__ import annotations

import numpy as np

from pagetide.kv_cache.layout import PAGE
from pagetide.ops.cpu.attention_tasks import SEGMENT, SPAN
from pagetide.ops.cpu.compiled import HAS_MATRIX_TILES, by_form, device_function, fast_exp
from pagetide.ops.cpu.matrix_tile import (
    MATRIX_DEPTH,
    MATRIX_ROWS,
    begin_tiles,
    end_tiles,
    matrix_tile,
    matrix_tile_of_pages,
)
from pagetide.ops.cpu.rounded_kv import add_rounded_values, round_queries, rounded_page_size, score_rounded
from pagetide.ops.cpu.scratch import KEYS, NEXT_KEYS, VALUES
from pagetide.ops.cpu.sync import take
from pagetide.ops.cpu.tile_code import LANES
from pagetide.ops.cpu.tiles import TILE_ROWS, depth_of, tile, tile_of_pages
from pagetide.ops.cpu.vectors import cap, clear, copy, prefetch, scale, soften

_MINUS_INFINITY = np.float32(-3.0e38)


@device_function
def _dense_page_size(kv, head_dim):  # type: ignore[no-untyped-def]
    """Elements of 16 tokens' keys or values."""
    return PAGE * head_dim


@device_function
def _leave(rows, queries, kv, scratch, thread):  # type: ignore[no-untyped-def]
    """Queries are multiplied by dense keys as they are."""


page_size = by_form(0, _dense_page_size, rounded_page_size)
_prepare_queries = by_form(2, _leave, round_queries)


@device_function
def attend(sync, phase, thread, scratch, q, layer, kv, block_table, work, window, soft_cap, out):  # type: ignore[no-untyped-def]
    """Each query against its sequence's tokens up to itself, at most `window` of them (0: all).

    soft_cap: what scores cannot exceed, 0: nothing.

    q [t, H, D], scaled; kv [layers, blocks, 2, K, pages * page_size]; out [t, H * D], in its own type.
    """
    head_dim = q.shape[2]
    num_kv_heads = kv.shape[3]
    group = q.shape[1] // num_kv_heads
    queries, weights, scores, sums = (
        scratch.queries[thread],
        scratch.weights[thread],
        scratch.scores[thread],
        scratch.sums[thread],
    )
    peaks, totals, places = scratch.peaks[thread], scratch.totals[thread], scratch.places[thread]
    folded = scratch.folded[thread]
    number = take(sync, phase, thread, work.tasks.shape[0])
    while number >= 0:
        sequence, head, first, num_queries = (
            work.tasks[number, 0],
            work.tasks[number, 1],
            work.tasks[number, 2],
            work.tasks[number, 3],
        )
        start, begin, part = work.tasks[number, 4], work.tasks[number, 5], work.tasks[number, 6]
        member = work.tasks[number, 7]
        rows, last = num_queries * group, work.ends[number]
        for row in range(rows):
            query, own = row // group, head * group + row % group
            token = work.members[member + query, 0] if member >= 0 else first + query
            copy(q, (token * q.shape[1] + own) * head_dim, head_dim, queries, row * head_dim)
            peaks[row], totals[row] = _MINUS_INFINITY, 0
        _prepare_queries(rows, queries, kv, scratch, thread)
        clear(sums, 0, (rows + TILE_ROWS - 1) // TILE_ROWS * TILE_ROWS * head_dim)
        if window > 0:
            begin = max(begin, max(0, start - window + 1) // SPAN * SPAN)
        _find_pages(layer, kv, 0, head, block_table, sequence, begin, last, head_dim, places, KEYS)
        for key in range(begin, min(begin + SPAN, last), PAGE):
            prefetch(kv, places[KEYS, (key - begin) // PAGE], page_size(kv, head_dim))
        is_folded = False
        for at in range(begin, last, SPAN):
            end = min(at + SPAN, last)
            _find_pages(layer, kv, 0, head, block_table, sequence, at, last, head_dim, places, KEYS)
            _find_pages(layer, kv, 1, head, block_table, sequence, at, last, head_dim, places, VALUES)
            _find_pages(
                layer, kv, 0, head, block_table, sequence, at + SPAN, last, head_dim, places, NEXT_KEYS
            )
            _score(rows, queries, kv, places, end - at, scratch, thread, scores)
            if soft_cap > 0:
                for row in range(rows):
                    cap(scores, row * SPAN, (end - at + PAGE - 1) // PAGE * PAGE, soft_cap)
            _weigh(rows, group, scores, at, end, start, window, peaks, totals, weights, sums)
            _add_values(rows, weights, kv, places, end - at, scratch, thread, sums)
            if end < last and end % SEGMENT == 0:
                for row in range(rows):
                    _fold(sums, row, peaks[row], totals[row], folded, row, is_folded)
                    peaks[row], totals[row] = _MINUS_INFINITY, 0
                clear(sums, 0, (rows + TILE_ROWS - 1) // TILE_ROWS * TILE_ROWS * head_dim)
                is_folded = True
        if is_folded:
            for row in range(rows):
                _fold(sums, row, peaks[row], totals[row], folded, row, True)
                copy(folded, row * (head_dim + 2), head_dim, sums, row * head_dim)
                totals[row] = folded[row, head_dim + 1]
        for row in range(rows):
            if part >= 0:
                to, g = work.members[member + row // group, 1] if member >= 0 else part, row % group
                copy(sums, row * head_dim, head_dim, work.parts, (to * group + g) * (head_dim + 2))
                work.parts[to, g, head_dim], work.parts[to, g, head_dim + 1] = peaks[row], totals[row]
            else:
                inverse = np.float32(1) / totals[row]
                place = ((first + row // group) * q.shape[1] + head * group + row % group) * head_dim
                scale(sums, row * head_dim, inverse, head_dim, out, place)
        number = take(sync, phase, thread, work.tasks.shape[0])


@device_function
def _fold(sums, row, peak, total, folded, to, adds):  # type: ignore[no-untyped-def]
    """Joins a row's sums over one segment to those over all before, or begins with them if not adds.

    folded float32 [rows, D + 2]: sums, then peak and total, as parts have them.
    """
    head_dim = sums.shape[1]
    if not adds:
        copy(sums, row * head_dim, head_dim, folded, to * (head_dim + 2))
        folded[to, head_dim], folded[to, head_dim + 1] = peak, total
        return
    before = folded[to, head_dim]
    # One product only: of two, the compiler may round either before the sum.
    if peak > before:
        decay = fast_exp(before - peak)
        for i in range(head_dim):
            folded[to, i] = folded[to, i] * decay + sums[row, i]
        folded[to, head_dim] = peak
        folded[to, head_dim + 1] = folded[to, head_dim + 1] * decay + total
    else:
        decay = fast_exp(peak - before)
        for i in range(head_dim):
            folded[to, i] += sums[row, i] * decay
        folded[to, head_dim + 1] += total * decay


@device_function
def merge(sync, phase, thread, scratch, work, head_dim, out):  # type: ignore[no-untyped-def]
    """Joins the parts of queries whose keys were split; out as in attend."""
    group = work.parts.shape[1]
    sums, folded = scratch.sums[thread], scratch.folded[thread]
    number = take(sync, phase, thread, work.merges.shape[0])
    while number >= 0:
        token, head, first, count = (
            work.merges[number, 0],
            work.merges[number, 1],
            work.merges[number, 2],
            work.merges[number, 3],
        )
        for g in range(group):
            for part in range(first, first + count):
                copy(work.parts, (part * group + g) * (head_dim + 2), head_dim, sums, 0)
                peak, total = work.parts[part, g, head_dim], work.parts[part, g, head_dim + 1]
                _fold(sums, 0, peak, total, folded, 0, part > first)
            inverse = np.float32(1) / folded[0, head_dim + 1]
            place = token * out.shape[1] + (head * group + g) * head_dim
            scale(folded, 0, inverse, head_dim, out, place)
        number = take(sync, phase, thread, work.merges.shape[0])


@device_function
def _find_pages(layer, kv, which, head, block_table, sequence, begin, last, head_dim, places, row):  # type: ignore[no-untyped-def]
    """places[row] = the elements of the whole pool at which the pages of a span's keys (which 0) or values
    (1) begin; a page that the sequence does not have yet stands where the one before does.
    """
    size = page_size(kv, head_dim)
    for page in range(places.shape[1]):
        key = begin + page * PAGE
        if key < last:
            block, offset = key // PAGE, 0
            if kv.shape[4] != size:
                block, offset = block * size // kv.shape[4], block * size % kv.shape[4]
            place = ((layer * kv.shape[1] + block_table[sequence, block]) * 2 + which) * kv.shape[3] + head
            places[row, page] = place * kv.shape[4] + offset
        else:
            places[row, page] = places[row, page - 1] if page > 0 else places[VALUES, 0]


@device_function
def _score_dense(rows, queries, kv, places, num_keys, scratch, thread, scores):  # type: ignore[no-untyped-def]
    """scores[row, key] of a span's keys, and of what fills up its last two pages."""
    head_dim = queries.shape[1]
    for page in range(0, (num_keys + PAGE - 1) // PAGE, 2):
        at, apart = places[KEYS, page], places[KEYS, page + 1] - places[KEYS, page]
        prefetch(kv, places[VALUES, page], PAGE * head_dim)
        prefetch(kv, places[VALUES, page + 1], PAGE * head_dim)
        for row in range(0, rows, TILE_ROWS):
            left, x_at, to = rows - row, row * head_dim, row * SPAN + page * PAGE
            if left == 1:
                tile(1, 2, False, False, queries, x_at, head_dim, kv, at, apart, head_dim, scores, to, SPAN)
            elif left == 2:
                tile(2, 2, False, False, queries, x_at, head_dim, kv, at, apart, head_dim, scores, to, SPAN)
            elif TILE_ROWS == 3 or left == 3:
                tile(3, 2, False, False, queries, x_at, head_dim, kv, at, apart, head_dim, scores, to, SPAN)
            elif left == 4:
                tile(4, 2, False, False, queries, x_at, head_dim, kv, at, apart, head_dim, scores, to, SPAN)
            else:
                tile(8, 2, False, False, queries, x_at, head_dim, kv, at, apart, head_dim, scores, to, SPAN)


@device_function
def _weigh(rows, group, scores, begin, end, start, window, peaks, totals, weights, sums):  # type: ignore[no-untyped-def]
    """weights[row, key - begin] = exp(score - peak) of the keys that a row's query sees, and 0 for others.

    peaks, totals and sums follow.
    """
    head_dim = sums.shape[1]
    width = (end - begin + PAGE - 1) // PAGE * PAGE
    for row in range(rows):
        position, at = start + row // group, row * SPAN
        low = max(position - window + 1 - begin, 0) if window > 0 else 0
        high = min(position + 1, end) - begin
        if low >= min(high, width):  # it sees none: what fills up the last page may be anything
            clear(weights, at, width)
            continue
        before = peaks[row]
        peak, total = soften(scores, at, low, high, width, before, weights, at)
        decay = np.float32(1)
        if peak > before:
            decay = fast_exp(before - peak)
            scale(sums, row * head_dim, decay, head_dim, sums, row * head_dim)
        peaks[row], totals[row] = peak, total + totals[row] * decay


@device_function
def _add_dense_values(rows, weights, kv, places, num_keys, scratch, thread, sums):  # type: ignore[no-untyped-def]
    """sums[row] += weights[row, key] * values of all keys of a span."""
    depth, whole = depth_of(kv), num_keys // PAGE
    _add_pages(rows, weights, 0, kv, places, 0, whole, PAGE, sums)
    if num_keys % PAGE:  # what lies behind the last value may be anything
        size = (num_keys % PAGE + depth - 1) // depth * depth
        _add_pages(rows, weights, whole * PAGE, kv, places, whole, 1, size, sums)


@device_function
def _add_pages(rows, weights, weights_at, kv, places, page, pages, size, sums):  # type: ignore[no-untyped-def]
    """The same for so many pages, of each so many keys."""
    head_dim = sums.shape[1]
    num_panels, apart = head_dim // PAGE, PAGE * PAGE
    p, ahead = VALUES * places.shape[1] + page, NEXT_KEYS * places.shape[1] + page
    for row in range(0, rows, TILE_ROWS):
        x_at, left, panel = row * SPAN + weights_at, rows - row, 0
        while panel < num_panels:
            at, to = panel * apart, row * head_dim + panel * PAGE
            if num_panels - panel >= 4 and left <= 4 and TILE_ROWS > 3:
                _add_four(left, weights, x_at, kv, places, p, ahead, pages, at, size, sums, to)
                panel += 4
            elif num_panels - panel >= 2:
                _add_two(left, row == 0, weights, x_at, kv, places, p, ahead, pages, at, size, sums, to)
                panel += 2
            else:
                tile_of_pages(
                    TILE_ROWS,
                    1,
                    True,
                    weights,
                    x_at,
                    SPAN,
                    kv,
                    places,
                    p,
                    ahead,
                    pages,
                    at,
                    apart,
                    size,
                    sums,
                    to,
                    head_dim,
                )
                panel += 1


@device_function
def _add_four(rows, weights, x_at, kv, places, p, ahead, pages, at, size, sums, to):  # type: ignore[no-untyped-def]
    """Four panels of values, for so many queries, at most 4."""
    apart, d = PAGE * PAGE, sums.shape[1]
    if rows == 1:
        tile_of_pages(
            1, 4, True, weights, x_at, SPAN, kv, places, p, ahead, pages, at, apart, size, sums, to, d
        )
    elif rows == 2:
        tile_of_pages(
            2, 4, True, weights, x_at, SPAN, kv, places, p, ahead, pages, at, apart, size, sums, to, d
        )
    elif rows == 3:
        tile_of_pages(
            3, 4, True, weights, x_at, SPAN, kv, places, p, ahead, pages, at, apart, size, sums, to, d
        )
    else:
        tile_of_pages(
            4, 4, True, weights, x_at, SPAN, kv, places, p, ahead, pages, at, apart, size, sums, to, d
        )


@device_function
def _add_two(rows, looks_ahead, weights, x_at, kv, places, p, ahead, pages, at, size, sums, to):  # type: ignore[no-untyped-def]
    """Two panels of values, for so many queries, at most TILE_ROWS."""
    apart, d = PAGE * PAGE, sums.shape[1]
    if rows < 3:
        tile_of_pages(
            2, 2, True, weights, x_at, SPAN, kv, places, p, ahead, pages, at, apart, size, sums, to, d
        )
    elif looks_ahead:
        tile_of_pages(
            TILE_ROWS, 2, True, weights, x_at, SPAN, kv, places, p, ahead, pages, at, apart, size, sums, to, d
        )
    else:
        tile_of_pages(
            TILE_ROWS,
            2,
            False,
            weights,
            x_at,
            SPAN,
            kv,
            places,
            p,
            ahead,
            pages,
            at,
            apart,
            size,
            sums,
            to,
            d,
        )


@device_function
def _score_halves(rows, queries, kv, places, num_keys, scratch, thread, scores):  # type: ignore[no-untyped-def]
    """As _score_dense, with the processor's matrix tiles, if they go into a head."""
    head_dim = queries.shape[1]
    if head_dim % MATRIX_DEPTH != 0:
        _score_dense(rows, queries, kv, places, num_keys, scratch, thread, scores)
        return
    begin_tiles(rows, MATRIX_DEPTH)
    for page in range(0, (num_keys + PAGE - 1) // PAGE, 2):
        at, apart = places[KEYS, page], places[KEYS, page + 1] - places[KEYS, page]
        prefetch(kv, places[VALUES, page], PAGE * head_dim)
        prefetch(kv, places[VALUES, page + 1], PAGE * head_dim)
        for row in range(0, rows, MATRIX_ROWS):
            x_at, to = row * head_dim, row * SPAN + page * PAGE
            if rows - row <= LANES:
                matrix_tile(
                    1, False, False, queries, x_at, head_dim, kv, at, apart, head_dim, scores, to, SPAN
                )
            else:
                matrix_tile(
                    2, False, False, queries, x_at, head_dim, kv, at, apart, head_dim, scores, to, SPAN
                )
    end_tiles()


@device_function
def _add_half_values(rows, weights, kv, places, num_keys, scratch, thread, sums):  # type: ignore[no-untyped-def]
    """As _add_dense_values, with the processor's matrix tiles, if they go into a head."""
    head_dim, whole = sums.shape[1], num_keys // PAGE
    if head_dim % MATRIX_DEPTH != 0:
        _add_dense_values(rows, weights, kv, places, num_keys, scratch, thread, sums)
        return
    for page in range(whole):
        prefetch(kv, places[NEXT_KEYS, page], PAGE * head_dim)
    _add_matrix_pages(rows, weights, 0, kv, places, 0, whole, PAGE, sums)
    if num_keys % PAGE:  # what lies behind the last value may be anything
        size = (num_keys % PAGE + 1) // 2 * 2
        _add_matrix_pages(rows, weights, whole * PAGE, kv, places, whole, 1, size, sums)


@device_function
def _add_matrix_pages(rows, weights, weights_at, kv, places, page, pages, size, sums):  # type: ignore[no-untyped-def]
    """The same for so many pages, of each so many keys."""
    head_dim, apart = sums.shape[1], PAGE * PAGE
    p = VALUES * places.shape[1] + page
    begin_tiles(rows, size)
    for row in range(0, rows, MATRIX_ROWS):
        x_at = row * SPAN + weights_at
        for column in range(0, head_dim, 2 * PAGE):
            at, to = column * PAGE, row * head_dim + column
            if rows - row <= LANES:
                matrix_tile_of_pages(
                    1, weights, x_at, SPAN, kv, places, p, pages, at, apart, PAGE, sums, to, head_dim
                )
            else:
                matrix_tile_of_pages(
                    2, weights, x_at, SPAN, kv, places, p, pages, at, apart, PAGE, sums, to, head_dim
                )
    end_tiles()


_score = by_form(2, _score_dense, score_rounded, _score_halves if HAS_MATRIX_TILES else None)
_add_values = by_form(
    2, _add_dense_values, add_rounded_values, _add_half_values if HAS_MATRIX_TILES else None
)
