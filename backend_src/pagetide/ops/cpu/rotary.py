"""QK-norm, rotary embedding and the write into the cache, one pass over a step's tokens."""

from __future__ import annotations

import numpy as np

from pagetide.kv_cache.layout import PAGE
from pagetide.ops.cpu.attention import page_size
from pagetide.ops.cpu.compiled import by_form, device_function, store
from pagetide.ops.cpu.norm import inverse_norm
from pagetide.ops.cpu.rotate import rotate
from pagetide.ops.cpu.rounded_kv import write_rounded_key, write_rounded_value
from pagetide.ops.cpu.sync import take
from pagetide.ops.cpu.tile_code import LANES
from pagetide.ops.cpu.tiles import depth_of
from pagetide.ops.cpu.vectors import copy, scale_by, store_pair, weave

_TOKENS = 4  # of a task


@device_function
def write(sync, phase, thread, scratch, qkv, layer, kv, places, turns, norms, eps, scale, q):  # type: ignore[no-untyped-def]
    """qkv float32 [t, (H + 2K) * D]: queries, times scale, go to q [t, H, D]; keys and values to kv
    [layers, blocks, 2, K, pages * page_size].

    places: layers.Places; turns: cosines and sines float32 [max_len, D]; norms: weights of queries and
    keys float32 [D], or empty.
    """
    num_heads, head_dim = q.shape[1], q.shape[2]
    num_kv_heads, size = kv.shape[3], page_size(kv, head_dim)
    block_size = kv.shape[4] // size * PAGE
    width = qkv.shape[1]
    slots, positions = places.slots, places.positions
    num_tokens = len(slots)
    rotated = scratch.sums[thread, 0]
    num_tasks = (num_tokens + _TOKENS - 1) // _TOKENS
    task = take(sync, phase, thread, num_tasks)
    while task >= 0:
        for token in range(task * _TOKENS, min(task * _TOKENS + _TOKENS, num_tokens)):
            slot, position = slots[token], positions[token]
            block, offset = slot // block_size, slot % block_size
            page, line = offset // PAGE * size, offset % PAGE
            for head in range(num_heads):
                own, target = token * width + head * head_dim, (token * num_heads + head) * head_dim
                _rotate(qkv, own, turns, position, norms[0], eps, scale, scratch.sums[thread, 1], q, target)
            follows = token > 0 and line % 2 == 1 and slots[token - 1] == slot - 1
            is_followed = token + 1 < num_tokens and line % 2 == 0 and slots[token + 1] == slot + 1
            for head in range(num_kv_heads):
                first = (num_heads + head) * head_dim
                keys = ((layer * kv.shape[1] + block) * 2 * num_kv_heads + head) * kv.shape[4] + page
                values = keys + num_kv_heads * kv.shape[4]
                _rotate(
                    qkv,
                    token * width + first,
                    turns,
                    position,
                    norms[1],
                    eps,
                    np.float32(1),
                    scratch.sums[thread, 1],
                    rotated,
                    0,
                )
                _write_key(kv, keys, line, rotated, scratch, thread)
                _write_value(
                    kv,
                    values,
                    line,
                    qkv,
                    token * width + first + num_kv_heads * head_dim,
                    head_dim,
                    follows,
                    is_followed,
                    scratch,
                    thread,
                )
        task = take(sync, phase, thread, num_tasks)


@device_function
def _write_dense_key(kv, page, line, key, scratch, thread):  # type: ignore[no-untyped-def]
    """page: the element of the whole pool at which the keys of a page begin."""
    if depth_of(kv) == 2:
        for i in range(0, key.shape[0], 2):
            store_pair(kv, page + i * LANES + line * 2, key[i], key[i + 1])
    else:
        for i in range(key.shape[0]):
            store(kv, page + i * LANES + line, key[i])


@device_function
def _write_dense_value(kv, page, line, rows, at, size, follows, is_followed, scratch, thread):  # type: ignore[no-untyped-def]
    """rows' elements `at` and on.

    In bfloat16 two tokens of the step that make a pair are written together, when the first one's turn
    comes.

    What comes after the last token is multiplied by zero, so it must be a number: its place is filled with
    zeros.
    """
    if depth_of(kv) == 1:
        for i in range(0, size, LANES):
            copy(rows, at + i, LANES, kv, page + i * PAGE + line * LANES)
    elif not follows:
        for i in range(0, size, LANES):
            place = page + i * PAGE + line // 2 * 2 * LANES
            if is_followed:
                weave(kv, place, rows, at + i, at + i + rows.shape[1])
            elif line % 2 == 0:
                weave(kv, place, rows, at + i, None)
            else:
                weave(kv, place, rows, None, at + i)


@device_function
def _rotate(rows, at, turns, position, norm, eps, factor, head, out, out_at):  # type: ignore[no-untyped-def]
    """One head: rows' elements `at` and on, normalized if norm is not empty (in the scratch memory `head`),
    turned, times factor.
    """
    size = turns.shape[1]
    if norm.shape[0] > 0:
        scale_by(rows, at, norm, inverse_norm(rows, at, size, eps), size, head, 0)
        rotate(head, 0, turns, position * size, size // 2, factor, out, out_at)
    else:
        rotate(rows, at, turns, position * size, size // 2, factor, out, out_at)


_write_key = by_form(0, _write_dense_key, write_rounded_key)
_write_value = by_form(0, _write_dense_value, write_rounded_value)
