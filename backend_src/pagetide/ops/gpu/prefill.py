"""Attention of prompt chunks over the paged cache (FlashAttention-2, arXiv:2307.08691): a program takes some
tokens of one chunk, with all query heads of one KV head as the rows of its matrix products.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from pagetide.ops.attention import HeadShape, LayerAttention
from pagetide.ops.gpu.device import dim_block
from pagetide.ops.gpu.scores import capped, score_factor, score_limit


class Choice(NamedTuple):
    """Rows and keys of a matrix product, warps, stages of loads."""

    rows: int
    keys: int
    warps: int
    stages: int


TUNED = Choice(128, 64, 4, 3)  # found by scripts/gpu_check.sh --only tune


def choice_for(head_dim: int, dtype: torch.dtype) -> Choice:
    """What fits into registers, and into the 99 KiB of shared memory that smaller GPUs have
    (scripts/gpu_kernels.md).
    """
    if dtype is torch.float32:
        return Choice(32, 32, 8, 1)
    return TUNED if head_dim <= 128 else Choice(64, 32, 8, 2)


@triton.jit
def _attend_tiles(
    queries,
    result,
    highest,
    total,
    kv,
    table,
    kv_head,
    position,
    scale,
    start,
    end,
    length,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    LIMIT: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
):
    dim = tl.arange(0, DIM_BLOCK)
    for tile in range(start, end, TILE):
        at = tile + tl.arange(0, TILE)
        if MASKED:
            block = tl.load(table + at // BLOCK_SIZE, mask=at < length, other=0).to(tl.int64)
        else:
            block = tl.load(table + at // BLOCK_SIZE).to(tl.int64)
        place = ((block * 2 * KV_HEADS + kv_head) * BLOCK_SIZE + at % BLOCK_SIZE) * HEAD_DIM
        key_places = kv + place[None, :] + dim[:, None]
        value_places = kv + KV_HEADS * BLOCK_SIZE * HEAD_DIM + place[:, None] + dim[None, :]
        if MASKED:
            is_key = at < length
            keys = tl.load(key_places, mask=is_key[None, :] & (dim[:, None] < HEAD_DIM), other=0.0)
            values = tl.load(value_places, mask=is_key[:, None] & (dim[None, :] < HEAD_DIM), other=0.0)
        elif DIM_BLOCK == HEAD_DIM:
            keys = tl.load(key_places)
            values = tl.load(value_places)
        else:
            keys = tl.load(key_places, mask=dim[:, None] < HEAD_DIM, other=0.0)
            values = tl.load(value_places, mask=dim[None, :] < HEAD_DIM, other=0.0)
        scores = tl.dot(queries, keys.to(queries.dtype), input_precision="ieee") * scale
        if LIMIT > 0:
            scores = capped(scores, LIMIT)
        if MASKED:
            visible = at[None, :] <= position[:, None]
            if WINDOW > 0:
                visible &= at[None, :] > position[:, None] - WINDOW
            # Finite, since a tile may hold no key at all that some query sees.
            scores = tl.where(visible, scores, -1.0e30)
        higher = tl.maximum(highest, tl.max(scores, 1))
        correction = tl.exp2(highest - higher)
        weights = tl.exp2(scores - higher[:, None])
        if MASKED and WINDOW > 0:
            weights = tl.where(scores > -1.0e30, weights, 0.0)
        total = total * correction + tl.sum(weights, 1)
        result = result * correction[:, None]
        result = tl.dot(weights.to(queries.dtype), values.to(queries.dtype), result, input_precision="ieee")
        highest = higher
    return result, highest, total


@triton.jit(do_not_specialize_on_alignment=["tiles"])
def _prefill(
    q,
    kv,
    block_table,
    tiles,
    out,
    scale,
    value_scale,
    q_stride,
    table_stride,
    WINDOW: tl.constexpr,
    LIMIT: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
):
    task, kv_head = tl.program_id(1), tl.program_id(0)
    sequence = tl.load(tiles + task * 4).to(tl.int64)
    first = tl.load(tiles + task * 4 + 1)
    count = tl.load(tiles + task * 4 + 2)
    start = tl.load(tiles + task * 4 + 3)
    row = tl.arange(0, ROWS)
    dim = tl.arange(0, DIM_BLOCK)
    of = row // GROUP  # which of the tile's tokens
    token = (first + of).to(tl.int64)
    head = kv_head * GROUP + row % GROUP
    inside = (of[:, None] < count) & (dim[None, :] < HEAD_DIM)
    queries = tl.load(
        q + token[:, None] * q_stride + head[:, None] * HEAD_DIM + dim[None, :], mask=inside, other=0.0
    )
    position = start + of
    length = start + count  # keys that the last of the tokens sees
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(start - WINDOW + 1, 0) // TILE * TILE
    # Every token sees all keys of the tiles before `whole`.
    whole = begin
    if WINDOW == 0:
        whole = (start + 1) // TILE * TILE
    table = block_table + sequence * table_stride
    highest = tl.full([ROWS], -1.0e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    result = tl.zeros([ROWS, DIM_BLOCK], tl.float32)
    if WINDOW == 0:
        result, highest, total = _attend_tiles(
            queries, result, highest, total, kv, table, kv_head, position, scale, begin, whole, length,
            False, WINDOW, LIMIT, KV_HEADS, HEAD_DIM, BLOCK_SIZE, TILE, DIM_BLOCK,
        )  # fmt: skip
    result, highest, total = _attend_tiles(
        queries, result, highest, total, kv, table, kv_head, position, scale, whole, length, length,
        True, WINDOW, LIMIT, KV_HEADS, HEAD_DIM, BLOCK_SIZE, TILE, DIM_BLOCK,
    )  # fmt: skip
    result = result * (value_scale / tl.where(total > 0, total, 1.0))[:, None]
    target = out + token[:, None] * KV_HEADS * GROUP * HEAD_DIM + head[:, None] * HEAD_DIM + dim[None, :]
    tl.store(target, result.to(out.dtype.element_ty), mask=inside)


def tokens_of_tile(shape: HeadShape, dtype: torch.dtype) -> int:
    """How many tokens of a chunk one program takes."""
    return max(1, _rows(shape, dtype) // shape.group)


def _rows(shape: HeadShape, dtype: torch.dtype) -> int:
    return max(choice_for(shape.head_dim, dtype).rows, triton.next_power_of_2(shape.group))


def attend_chunks(
    shape: HeadShape,
    q: torch.Tensor,
    kv: torch.Tensor,
    block_table: torch.Tensor,
    layer: LayerAttention,
    tiles: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Writes the rows of the tiles' tokens in out [t, H * head_dim]; q [t, H, head_dim], rows apart by
    q.stride(0).

    tiles int32 [n, 4]: of each tile of tokens_of_tile tokens its sequence, its first token in the step, how
    many tokens it has, and the first one's position.
    """
    choice = choice_for(shape.head_dim, q.dtype)
    _prefill[(shape.num_kv_heads, len(tiles))](
        q,
        kv,
        block_table,
        tiles,
        out,
        score_factor(shape, layer),
        layer.v_scale,
        q.stride(0),
        block_table.stride(0),
        layer.window,
        score_limit(shape),
        shape.num_kv_heads,
        shape.group,
        shape.head_dim,
        kv.shape[3],
        _rows(shape, q.dtype),
        choice.keys,
        dim_block(shape.head_dim),
        num_warps=choice.warps,
        num_stages=choice.stages,
    )


def chunk_tiles(firsts: np.ndarray, counts: np.ndarray, starts: np.ndarray, size: int) -> np.ndarray:
    """attend_chunks' tiles of all sequences with more than one token, those with the most keys first: what
    takes longest should not begin last.
    """
    longer = np.flatnonzero(counts > 1)
    num_tiles = -(-counts[longer] // size)
    owners = np.repeat(longer, num_tiles)
    offsets = (np.arange(num_tiles.sum()) - np.repeat(np.cumsum(num_tiles) - num_tiles, num_tiles)) * size
    tiles = np.stack(
        [
            owners,
            firsts[owners] + offsets,
            np.minimum(counts[owners] - offsets, size),
            starts[owners] + offsets,
        ],
        axis=1,
    ).astype(np.int32)
    return tiles[np.argsort(-tiles[:, 3], kind="stable")]
