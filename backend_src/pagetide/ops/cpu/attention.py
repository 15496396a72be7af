"""Paged attention straight on the packed KV blocks, with online softmax (arXiv:1805.02867) over spans of
128 keys.

A task is one (sequence, tile of queries, range of keys) for one KV head, or for several of a single query:
all query heads that share a KV head are rows of one matrix, so that keys and values are read once for the
whole group. Long contexts of single queries are split over several tasks, whose parts are merged afterwards
(Flash-Decoding, https://pytorch.org/blog/flash-decoding).

Pages lie anywhere in memory, so the processor cannot guess the next ones: a span's values are asked for
while its keys are multiplied, and the next span's keys while its values are.
"""

from __future__ import annotations

import numpy as np

from pagetide.kv_cache.layout import PAGE
from pagetide.ops.cpu.attention_tasks import SPAN, rows_of_head
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
        sequence, head, heads, first, num_queries = (
            work.tasks[number, 0],
            work.tasks[number, 1],
            work.tasks[number, 2],
            work.tasks[number, 3],
            work.tasks[number, 4],
        )
        start, begin, part = work.tasks[number, 5], work.tasks[number, 6], work.tasks[number, 7]
        rows = num_queries * group  # of each KV head
        stride = rows_of_head(rows)
        for h in range(heads):
            for r in range(rows):
                token, own = first + r // group, (head + h) * group + r % group
                row = h * stride + r
                copy(q, (token * q.shape[1] + own) * head_dim, head_dim, queries, row * head_dim)
                peaks[row], totals[row] = _MINUS_INFINITY, 0
        clear(sums, 0, heads * stride * head_dim)
        if window > 0:
            begin = max(begin, max(0, start - window + 1) // PAGE * PAGE)
        for key in range(begin, min(begin + SPAN, work.ends[number]), PAGE):
            _ask_for_keys(layer, kv, head, heads, block_table, sequence, key, head_dim)
        for at in range(begin, work.ends[number], SPAN):
            end = min(at + SPAN, work.ends[number])
            _score(heads, rows, stride, queries, layer, kv, head, block_table, sequence, at, end, scores)
            _weigh(heads, rows, stride, group, scores, at, end, start, window, peaks, totals, weights, sums)
            _add_values(
                heads,
                rows,
                stride,
                weights,
                layer,
                kv,
                head,
                block_table,
                sequence,
                at,
                end,
                work.ends[number],
                sums,
            )
        for h in range(heads):
            for r in range(rows):
                row, own = h * stride + r, (head + h) * group + r % group
                if part >= 0:
                    copy(
                        sums, row * head_dim, head_dim, work.parts, (part * q.shape[1] + own) * (head_dim + 2)
                    )
                    work.parts[part, own, head_dim], work.parts[part, own, head_dim + 1] = (
                        peaks[row],
                        totals[row],
                    )
                else:
                    inverse = np.float32(1) / totals[row]
                    place = ((first + r // group) * q.shape[1] + own) * head_dim
                    scale(sums, row * head_dim, inverse, head_dim, out, place)
        number = take(sync, phase, thread, work.tasks.shape[0])


@device_function
def merge(sync, phase, thread, scratch, work, num_kv_heads, head_dim, out):  # type: ignore[no-untyped-def]
    """Joins the parts of queries whose keys were split; out as in attend."""
    group = work.parts.shape[1] // num_kv_heads
    sums = scratch.sums[thread]
    number = take(sync, phase, thread, work.merges.shape[0])
    while number >= 0:
        token, head, first, count = (
            work.merges[number, 0],
            work.merges[number, 1],
            work.merges[number, 2],
            work.merges[number, 3],
        )
        for own in range(head * group, (head + 1) * group):
            peak = _MINUS_INFINITY
            for part in range(first, first + count):
                peak = max(peak, work.parts[part, own, head_dim])
            for i in range(head_dim):
                sums[0, i] = 0
            total = np.float32(0)
            for part in range(first, first + count):
                factor = fast_exp(work.parts[part, own, head_dim] - peak)
                total += factor * work.parts[part, own, head_dim + 1]
                for i in range(head_dim):
                    sums[0, i] += factor * work.parts[part, own, i]
            for i in range(head_dim):
                store(out, token * out.shape[1] + own * head_dim + i, sums[0, i] / total)
        number = take(sync, phase, thread, work.merges.shape[0])


@device_function
def _score(heads, rows, stride, queries, layer, kv, head, block_table, sequence, begin, end, scores):  # type: ignore[no-untyped-def]
    """scores[row, key - begin] of all keys in the pages from begin to end."""
    head_dim = queries.shape[1]
    values = kv.shape[3] * kv.shape[4]
    for key in range(begin, end, PAGE):
        for h in range(heads):
            at = _page_place(layer, kv, 0, head + h, block_table, sequence, key, head_dim)
            prefetch(kv, at + values, PAGE * head_dim)
            for r in range(0, rows, TILE_ROWS):
                row = h * stride + r
                _score_page(
                    rows - r, queries, row * head_dim, head_dim, kv, at, scores, row * SPAN + key - begin
                )


@device_function
def _score_page(rows, queries, x_at, head_dim, kv, at, scores, out_at):  # type: ignore[no-untyped-def]
    """A page's scores for so many queries, at most TILE_ROWS."""
    if rows == 1:
        tile(1, 1, False, False, queries, x_at, head_dim, kv, at, 0, head_dim, scores, out_at, SPAN)
    elif rows == 2:
        tile(2, 1, False, False, queries, x_at, head_dim, kv, at, 0, head_dim, scores, out_at, SPAN)
    elif TILE_ROWS == 3 or rows == 3:
        tile(3, 1, False, False, queries, x_at, head_dim, kv, at, 0, head_dim, scores, out_at, SPAN)
    elif rows == 4:
        tile(4, 1, False, False, queries, x_at, head_dim, kv, at, 0, head_dim, scores, out_at, SPAN)
    else:
        tile(8, 1, False, False, queries, x_at, head_dim, kv, at, 0, head_dim, scores, out_at, SPAN)


@device_function
def _weigh(heads, rows, stride, group, scores, begin, end, start, window, peaks, totals, weights, sums):  # type: ignore[no-untyped-def]
    """weights[row, key - begin] = exp(score - peak) of the keys that a row's query sees, and 0 for others.

    peaks, totals and sums follow.
    """
    head_dim = sums.shape[1]
    width = (end - begin + PAGE - 1) // PAGE * PAGE
    for h in range(heads):
        for r in range(rows):
            row, position = h * stride + r, start + r // group
            low = max(position - window + 1 - begin, 0) if window > 0 else 0
            high = min(position + 1, end) - begin
            before, at = peaks[row], row * SPAN
            peak, total = soften(scores, at, low, high, width, before, weights, at)
            decay = np.float32(1)
            if peak > before:
                decay = fast_exp(before - peak)
                scale(sums, row * head_dim, decay, head_dim, sums, row * head_dim)
            peaks[row], totals[row] = peak, total + totals[row] * decay


@device_function
def _add_values(heads, rows, stride, weights, layer, kv, head, block_table, sequence, begin, end, last, sums):  # type: ignore[no-untyped-def]
    """sums[row] += weights[row, key - begin] * values of all keys from begin to end, before the last."""
    head_dim = sums.shape[1]
    depth = depth_of(kv)
    for key in range(begin, end, PAGE):
        size = (min(PAGE, end - key) + depth - 1) // depth * depth
        if key + SPAN < last:
            _ask_for_keys(layer, kv, head, heads, block_table, sequence, key + SPAN, head_dim)
        for h in range(heads):
            place = _page_place(layer, kv, 1, head + h, block_table, sequence, key, head_dim)
            for r in range(0, rows, TILE_ROWS):
                row = h * stride + r
                x_at, left = row * SPAN + key - begin, rows - r
                panel, panels = 0, head_dim // PAGE
                while panel < panels:
                    at, out_at = place + panel * PAGE * PAGE, row * head_dim + panel * PAGE
                    if panels - panel >= 4 and left <= 4 and TILE_ROWS > 3:
                        _add_panels(left, weights, x_at, kv, at, size, sums, out_at, head_dim)
                        panel += 4
                    elif panels - panel >= 2:
                        _add_two(left, weights, x_at, kv, at, size, sums, out_at, head_dim)
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
def _add_panels(rows, weights, x_at, kv, at, size, sums, out_at, head_dim):  # type: ignore[no-untyped-def]
    """Four panels of a page's values, for so many queries, at most 4."""
    panel = PAGE * PAGE
    if rows == 1:
        tile(1, 4, True, False, weights, x_at, SPAN, kv, at, panel, size, sums, out_at, head_dim)
    elif rows == 2:
        tile(2, 4, True, False, weights, x_at, SPAN, kv, at, panel, size, sums, out_at, head_dim)
    elif rows == 3:
        tile(3, 4, True, False, weights, x_at, SPAN, kv, at, panel, size, sums, out_at, head_dim)
    else:
        tile(4, 4, True, False, weights, x_at, SPAN, kv, at, panel, size, sums, out_at, head_dim)


@device_function
def _add_two(rows, weights, x_at, kv, at, size, sums, out_at, head_dim):  # type: ignore[no-untyped-def]
    """Two panels of a page's values, for so many queries, at most TILE_ROWS."""
    panel = PAGE * PAGE
    if rows >= 3:
        tile(TILE_ROWS, 2, True, False, weights, x_at, SPAN, kv, at, panel, size, sums, out_at, head_dim)
    else:
        tile(2, 2, True, False, weights, x_at, SPAN, kv, at, panel, size, sums, out_at, head_dim)


@device_function
def _ask_for_keys(layer, kv, head, heads, block_table, sequence, key, head_dim):  # type: ignore[no-untyped-def]
    """Brings the keys of the page with this one into the cache."""
    for h in range(head, head + heads):
        place = _page_place(layer, kv, 0, h, block_table, sequence, key, head_dim)
        prefetch(kv, place, PAGE * head_dim)


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
