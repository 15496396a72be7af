"""Keys and values in the cache as 8-bit integers, each token and head with a scale of its own (the pages of
kv_tile.py): little more than half the memory of bfloat16. Queries, and the weights of values, are rounded
to 16 bits.
"""

from __future__ import annotations

import numpy as np

from pagetide.kv_cache.layout import PAGE
from pagetide.ops.cpu.attention_tasks import SPAN
from pagetide.ops.cpu.compiled import device_function
from pagetide.ops.cpu.encoding import encode_group
from pagetide.ops.cpu.kv_tile import KV_ROWS, PAGE_HEADER, put_float, scale_by_tokens, tile_of_rounded_pages
from pagetide.ops.cpu.scratch import KEYS, NEXT_KEYS, VALUES
from pagetide.ops.cpu.vectors import prefetch

_PANEL_BYTES = PAGE * PAGE  # 16 elements of a page's values


@device_function
def rounded_page_size(kv, head_dim):  # type: ignore[no-untyped-def]
    """As attention._dense_page_size."""
    return PAGE_HEADER + PAGE * head_dim


@device_function
def round_queries(rows, queries, kv, scratch, thread):  # type: ignore[no-untyped-def]
    """Makes a task's queries [rows, D] ready to be multiplied."""
    head_dim = queries.shape[1]
    codes, scales = scratch.query_codes[thread], scratch.query_scales[thread]
    for row in range(rows):
        at = row * 2 * head_dim
        encode_group(queries, row * head_dim, head_dim, True, codes, at, at + head_dim, scales, row * 2)


@device_function
def score_rounded(rows, queries, kv, places, num_keys, scratch, thread, scores):  # type: ignore[no-untyped-def]
    """As attention._score_dense, of what round_queries has rounded."""
    x, scales = scratch.query_codes[thread], scratch.query_scales[thread]
    head_dim = queries.shape[1]
    steps, size = head_dim // 4, rounded_page_size(kv, head_dim)
    for page in range(0, (num_keys + PAGE - 1) // PAGE, 2):
        at, apart = KEYS * places.shape[1] + page, places[KEYS, page + 1] - places[KEYS, page]
        prefetch(kv, places[VALUES, page], size)
        prefetch(kv, places[VALUES, page + 1], size)
        for row in range(0, rows, KV_ROWS):
            x_at, to = row * 2 * head_dim, row * SPAN + page * PAGE
            tile_of_rounded_pages(
                min(rows - row, KV_ROWS), 2, True, x, x_at, head_dim, scales, row * 2, kv, places, at, 1,
                PAGE_HEADER, apart, steps, scores, to, SPAN,
            )  # fmt: skip


@device_function
def add_rounded_values(rows, weights, kv, places, num_keys, scratch, thread, sums):  # type: ignore[no-untyped-def]
    """As attention._add_dense_values; weights float32, not needed any more afterwards."""
    head_dim = sums.shape[1]
    x, scales = scratch.weight_codes[thread], scratch.weight_scales[thread]
    pages = (num_keys + PAGE - 1) // PAGE
    for page in range(pages):
        prefetch(kv, places[NEXT_KEYS, page], rounded_page_size(kv, head_dim))
    for row in range(rows):
        for page in range(pages):
            scale_by_tokens(weights, row * SPAN + page * PAGE, kv, places[VALUES, page])
        at = row * 2 * SPAN
        encode_group(weights, row * SPAN, pages * PAGE, True, x, at, at + SPAN, scales, row * 2)
    first, steps = VALUES * places.shape[1], PAGE // 4
    for row in range(0, rows, KV_ROWS):
        left, x_at = min(rows - row, KV_ROWS), row * 2 * SPAN
        for panel in range(0, head_dim // PAGE, 2):
            at, to = PAGE_HEADER + panel * _PANEL_BYTES, row * head_dim + panel * PAGE
            if panel + 1 < head_dim // PAGE:
                tile_of_rounded_pages(
                    left, 2, False, x, x_at, SPAN, scales, row * 2, kv, places, first, pages, at,
                    _PANEL_BYTES, steps, sums, to, head_dim,
                )  # fmt: skip
            else:
                tile_of_rounded_pages(
                    left, 1, False, x, x_at, SPAN, scales, row * 2, kv, places, first, pages, at,
                    _PANEL_BYTES, steps, sums, to, head_dim,
                )  # fmt: skip


@device_function
def write_rounded_key(kv, page, line, key, scratch, thread):  # type: ignore[no-untyped-def]
    """As rotary._write_dense_key."""
    codes, scales, size = scratch.query_codes[thread], scratch.query_scales[thread], key.shape[0]
    encode_group(key, 0, size, True, codes, 0, -1, scales, 0)
    put_float(kv, page + 4 * line, scales[0])
    data = kv.reshape(-1)
    for i in range(size):
        data[page + PAGE_HEADER + i // 4 * 4 * PAGE + line * 4 + i % 4] = np.uint8(codes[i]) ^ np.uint8(128)


@device_function
def write_rounded_value(kv, page, line, rows, at, size, follows, is_followed, scratch, thread):  # type: ignore[no-untyped-def]
    """As rotary._write_dense_value; every token writes bytes of its own."""
    codes, scales = scratch.query_codes[thread], scratch.query_scales[thread]
    encode_group(rows, at, size, True, codes, 0, -1, scales, 0)
    put_float(kv, page + 4 * line, scales[0])
    data = kv.reshape(-1)
    first = page + PAGE_HEADER + line // 4 * 4 * PAGE + line % 4
    for i in range(size):
        data[first + i // PAGE * _PANEL_BYTES + i % PAGE * 4] = np.uint8(codes[i]) ^ np.uint8(128)
