"""Paged attention straight on the packed KV blocks, with online softmax (arXiv:1805.02867) over spans of
128 keys.

A task is one (sequence, KV head, tile of queries, range of keys): all query heads that share the KV head
are rows of one matrix, so that keys and values are read once for the whole group. Long contexts of single
queries are split over several tasks, whose parts are merged afterwards (Flash-Decoding,
https://pytorch.org/blog/flash-decoding).
"""

from __future__ import annotations

import numpy as np

from pagetide.kv_cache.layout import PAGE
from pagetide.ops.cpu.attention_tasks import SPAN
from pagetide.ops.cpu.compiled import device_function, fast_exp, store
from pagetide.ops.cpu.sync import take
from pagetide.ops.cpu.tiles import TILE_ROWS, depth_of, tile
from pagetide.ops.cpu.vectors import clear, copy, prefetch, scale, soften

_MINUS_INFINITY = np.float32(-3.0e38)


@device_function
def attend(sync, phase, thread, scratch, q, layer, kv, block_table, work, window, out):  # type: ignore[no-untyped-def]
    """Each query against its sequence's tokens up to itself, at most `window` of them (0: all).

    q [t, H, D], scaled; kv [layers, blocks, 2, K, block_size * D]; out [t, H * D], in its own type.
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
    peaks, totals = scratch.peaks[thread], scratch.totals[thread]
    number = take(sync, phase, thread, work.tasks.shape[0])
    while number >= 0:
        sequence, head, first, num_queries = (
            work.tasks[number, 0],
            work.tasks[number, 1],
            work.tasks[number, 2],
            work.tasks[number, 3],
        )
        start, begin, part = work.tasks[number, 4], work.tasks[number, 5], work.tasks[number, 6]
        rows = num_queries * group
        for row in range(rows):
            token, own = first + row // group, head * group + row % group
            copy(q, (token * q.shape[1] + own) * head_dim, head_dim, queries, row * head_dim)
            peaks[row], totals[row] = _MINUS_INFINITY, 0
        clear(sums, 0, (rows + TILE_ROWS - 1) // TILE_ROWS * TILE_ROWS * head_dim)
        if window > 0:
            begin = max(begin, max(0, start - window + 1) // PAGE * PAGE)
        for at in range(begin, work.ends[number], SPAN):
            end = min(at + SPAN, work.ends[number])
            _score(rows, queries, layer, kv, head, block_table, sequence, at, end, scores)
            width = (end - at + PAGE - 1) // PAGE * PAGE
            for row in range(rows):
                position = start + row // group
                low = max(position - window + 1 - at, 0) if window > 0 else 0
                before = peaks[row]
                peak, total = soften(
                    scores, row * SPAN, low, min(position + 1, end) - at, width, before, weights, row * SPAN
                )
                peaks[row] = peak
                if peak > before:
                    decay = fast_exp(before - peak)
                    total += totals[row] * decay
                    scale(sums, row * head_dim, decay, head_dim, sums, row * head_dim)
                else:
                    total += totals[row]
                totals[row] = total
            _add_values(rows, weights, layer, kv, head, block_table, sequence, at, end, sums)
        for row in range(rows):
            if part >= 0:
                copy(sums, row * head_dim, head_dim, work.parts, (part * group + row) * (head_dim + 2))
                work.parts[part, row, head_dim], work.parts[part, row, head_dim + 1] = peaks[row], totals[row]
            else:
                inverse = np.float32(1) / totals[row]
                place = ((first + row // group) * q.shape[1] + head * group + row % group) * head_dim
                scale(sums, row * head_dim, inverse, head_dim, out, place)
        number = take(sync, phase, thread, work.tasks.shape[0])


@device_function
def merge(sync, phase, thread, scratch, work, head_dim, out):  # type: ignore[no-untyped-def]
    """Joins the parts of queries whose keys were split; out as in attend."""
    group = work.parts.shape[1]
    sums = scratch.sums[thread]
    number = take(sync, phase, thread, work.merges.shape[0])
    while number >= 0:
        token, head, first, count = (
            work.merges[number, 0],
            work.merges[number, 1],
            work.merges[number, 2],
            work.merges[number, 3],
        )
        for g in range(group):
            peak = _MINUS_INFINITY
            for part in range(first, first + count):
                peak = max(peak, work.parts[part, g, head_dim])
            for i in range(head_dim):
                sums[0, i] = 0
            total = np.float32(0)
            for part in range(first, first + count):
                factor = fast_exp(work.parts[part, g, head_dim] - peak)
                total += factor * work.parts[part, g, head_dim + 1]
                for i in range(head_dim):
                    sums[0, i] += factor * work.parts[part, g, i]
            for i in range(head_dim):
                store(out, token * out.shape[1] + (head * group + g) * head_dim + i, sums[0, i] / total)
        number = take(sync, phase, thread, work.merges.shape[0])


@device_function
def _score(rows, queries, layer, kv, head, block_table, sequence, begin, end, scores):  # type: ignore[no-untyped-def]
    """scores[row, key - begin] of all keys in the pages from begin to end."""
    head_dim = queries.shape[1]
    values = kv.shape[3] * kv.shape[4]
    for key in range(begin, end, PAGE):
        at = _page_place(layer, kv, 0, head, block_table, sequence, key, head_dim)
        prefetch(kv, at + values, PAGE * head_dim)
        column = key - begin
        for row in range(0, rows, TILE_ROWS):
            x_at, out_at, left = row * head_dim, row * SPAN + column, rows - row
            if left == 1:
                tile(1, 1, False, False, queries, x_at, head_dim, kv, at, 0, head_dim, scores, out_at, SPAN)
            elif left == 2:
                tile(2, 1, False, False, queries, x_at, head_dim, kv, at, 0, head_dim, scores, out_at, SPAN)
            elif TILE_ROWS == 3 or left == 3:
                tile(3, 1, False, False, queries, x_at, head_dim, kv, at, 0, head_dim, scores, out_at, SPAN)
            elif left == 4:
                tile(4, 1, False, False, queries, x_at, head_dim, kv, at, 0, head_dim, scores, out_at, SPAN)
            else:
                tile(8, 1, False, False, queries, x_at, head_dim, kv, at, 0, head_dim, scores, out_at, SPAN)


@device_function
def _add_values(rows, weights, layer, kv, head, block_table, sequence, begin, end, sums):  # type: ignore[no-untyped-def]
    """sums[row] += weights[row, key - begin] * values of all keys from begin to end."""
    head_dim = sums.shape[1]
    for key in range(begin, end, PAGE):
        place = _page_place(layer, kv, 1, head, block_table, sequence, key, head_dim)
        size = (min(PAGE, end - key) + depth_of(kv) - 1) // depth_of(kv) * depth_of(kv)
        for row in range(0, rows, TILE_ROWS):
            x_at, left = row * SPAN + key - begin, rows - row
            panel, panels = 0, head_dim // PAGE
            while panel < panels:
                at, out_at = place + panel * PAGE * PAGE, row * head_dim + panel * PAGE
                if panels - panel >= 4 and left <= 4 and TILE_ROWS > 3:
                    if left == 1:
                        tile(
                            1,
                            4,
                            True,
                            False,
                            weights,
                            x_at,
                            SPAN,
                            kv,
                            at,
                            PAGE * PAGE,
                            size,
                            sums,
                            out_at,
                            head_dim,
                        )
                    elif left == 2:
                        tile(
                            2,
                            4,
                            True,
                            False,
                            weights,
                            x_at,
                            SPAN,
                            kv,
                            at,
                            PAGE * PAGE,
                            size,
                            sums,
                            out_at,
                            head_dim,
                        )
                    elif left == 3:
                        tile(
                            3,
                            4,
                            True,
                            False,
                            weights,
                            x_at,
                            SPAN,
                            kv,
                            at,
                            PAGE * PAGE,
                            size,
                            sums,
                            out_at,
                            head_dim,
                        )
                    else:
                        tile(
                            4,
                            4,
                            True,
                            False,
                            weights,
                            x_at,
                            SPAN,
                            kv,
                            at,
                            PAGE * PAGE,
                            size,
                            sums,
                            out_at,
                            head_dim,
                        )
                    panel += 4
                elif panels - panel >= 2:
                    if left >= 3:
                        tile(
                            TILE_ROWS,
                            2,
                            True,
                            False,
                            weights,
                            x_at,
                            SPAN,
                            kv,
                            at,
                            PAGE * PAGE,
                            size,
                            sums,
                            out_at,
                            head_dim,
                        )
                    else:
                        tile(
                            2,
                            2,
                            True,
                            False,
                            weights,
                            x_at,
                            SPAN,
                            kv,
                            at,
                            PAGE * PAGE,
                            size,
                            sums,
                            out_at,
                            head_dim,
                        )
                    panel += 2
                else:
                    tile(
                        TILE_ROWS,
                        1,
                        True,
                        False,
                        weights,
                        x_at,
                        SPAN,
                        kv,
                        at,
                        PAGE * PAGE,
                        size,
                        sums,
                        out_at,
                        head_dim,
                    )
                    panel += 1


@device_function
def _page_place(layer, kv, which, head, block_table, sequence, key, head_dim):  # type: ignore[no-untyped-def]
    """The element of the whole pool at which a sequence's page with this key begins."""
    block, offset = key, 0
    if kv.shape[4] == PAGE * head_dim:
        block = key // PAGE
    else:
        block, offset = key * head_dim // kv.shape[4], key * head_dim % kv.shape[4]
    return (
        ((layer * kv.shape[1] + block_table[sequence, block]) * 2 + which) * kv.shape[3] + head
    ) * kv.shape[4] + offset
