"""Attention of single tokens over the paged cache: the keys of one sequence are split between programs
(Flash-Decoding, pytorch.org/blog/flash-decoding), and the last program to end joins what they found.

The query heads of one KV head form the rows of one matrix product. The grid depends on the number of tokens
only, and everything else is read on the device: the launch can be captured in a graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from pagetide.ops.attention import HeadShape, LayerAttention
from pagetide.ops.gpu.device import dim_block, num_processors
from pagetide.ops.gpu.scores import capped, score_factor, score_limit

# Keys of a matrix product; found by scripts/gpu_check.sh --only tune.
TILE, NUM_WARPS, NUM_STAGES = 64, 4, 2
_ROWS = 16  # the fewest rows of a matrix product on tensor cores


@triton.jit
def _join(
    partial,
    statistics,
    first_place,
    num_splits,
    GROUP: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    JOINED: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
):
    """What the splits of one sequence and KV head found, as one: [GROUP_BLOCK, DIM_BLOCK]. Some splits at a
    time: one after the other, each would wait for memory.
    """
    of = tl.arange(0, GROUP_BLOCK)
    dim = tl.arange(0, DIM_BLOCK)
    highest = tl.full([GROUP_BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([GROUP_BLOCK], tl.float32)
    result = tl.zeros([GROUP_BLOCK, DIM_BLOCK], tl.float32)
    for first in range(0, num_splits, JOINED):
        other = first + tl.arange(0, JOINED)
        there = (other[:, None] < num_splits) & (of[None, :] < GROUP)
        places = first_place + other[:, None] * GROUP + of[None, :]
        its_highest = tl.load(statistics + places * 2, mask=there, other=-float("inf"), cache_modifier=".cg")
        its_total = tl.load(statistics + places * 2 + 1, mask=there, other=0.0, cache_modifier=".cg")
        its_result = tl.load(
            partial + places[:, :, None] * DIM_BLOCK + dim[None, None, :],
            mask=there[:, :, None],
            other=0.0,
            cache_modifier=".cg",
        )
        higher = tl.maximum(highest, tl.max(its_highest, 0))
        correction = tl.where(of < GROUP, tl.exp2(highest - higher), 0.0)
        its_correction = tl.where(there, tl.exp2(its_highest - higher[None, :]), 0.0)
        total = total * correction + tl.sum(its_total * its_correction, 0)
        result = result * correction[:, None] + tl.sum(its_result * its_correction[:, :, None], 0)
        highest = higher
    return result / tl.where(total > 0, total, 1.0)[:, None]


@triton.jit(do_not_specialize=["splits"], do_not_specialize_on_alignment=["tokens", "sequences"])
def _decode(
    q,
    kv,
    block_table,
    lengths,
    tokens,
    sequences,
    out,
    partial,
    statistics,
    arrivals,
    scale,
    value_scale,
    q_stride,
    table_stride,
    splits,
    WINDOW: tl.constexpr,
    LIMIT: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    MIN_TILES: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    JOINED: tl.constexpr,
    TILE: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
):
    kv_head, single, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence = tl.load(sequences + single)
    token = tl.load(tokens + single).to(tl.int64)
    length = tl.load(lengths + sequence)
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(length - WINDOW, 0)
    first_tile = begin // TILE
    num_tiles = tl.cdiv(length, TILE) - first_tile
    tiles = tl.maximum(tl.cdiv(num_tiles, splits), MIN_TILES)
    num_splits = tl.maximum(tl.cdiv(num_tiles, tiles), 1)
    if split >= num_splits:
        return

    row = tl.arange(0, ROWS)
    dim = tl.arange(0, DIM_BLOCK)
    head = kv_head * GROUP + row
    is_head = row[:, None] < GROUP
    inside = is_head & (dim[None, :] < HEAD_DIM)
    queries = tl.load(q + token * q_stride + head[:, None] * HEAD_DIM + dim[None, :], mask=inside, other=0.0)

    highest = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    result = tl.zeros([ROWS, DIM_BLOCK], tl.float32)
    table = block_table + sequence.to(tl.int64) * table_stride
    last = tl.minimum((first_tile + (split + 1) * tiles) * TILE, length)
    for start in range((first_tile + split * tiles) * TILE, last, TILE):
        at = start + tl.arange(0, TILE)
        is_key = (at >= begin) & (at < length)
        block = tl.load(table + at // BLOCK_SIZE, mask=at < length, other=0).to(tl.int64)
        place = ((block * 2 * KV_HEADS + kv_head) * BLOCK_SIZE + at % BLOCK_SIZE) * HEAD_DIM
        keys = tl.load(
            kv + place[None, :] + dim[:, None], mask=is_key[None, :] & (dim[:, None] < HEAD_DIM), other=0.0
        )
        scores = tl.dot(queries, keys.to(queries.dtype), input_precision="ieee") * scale
        if LIMIT > 0:
            scores = capped(scores, LIMIT)
        scores = tl.where(is_key[None, :], scores, -float("inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        correction = tl.exp2(highest - higher)
        weights = tl.exp2(scores - higher[:, None])
        values = tl.load(
            kv + KV_HEADS * BLOCK_SIZE * HEAD_DIM + place[:, None] + dim[None, :],
            mask=is_key[:, None] & (dim[None, :] < HEAD_DIM),
            other=0.0,
        ).to(queries.dtype)
        total = total * correction + tl.sum(weights, 1)
        result = result * correction[:, None]
        result = tl.dot(weights.to(values.dtype), values, result, input_precision="ieee")
        highest = higher

    target = out + token * KV_HEADS * GROUP * HEAD_DIM + head[:, None] * HEAD_DIM + dim[None, :]
    if num_splits == 1:
        # A padded sequence has no key at all.
        result = result * (value_scale / tl.where(total > 0, total, 1.0))[:, None]
        tl.store(target, result.to(out.dtype.element_ty), mask=inside)
        return

    # [singles, KV heads, splits, group(, dims)]
    group = (single * KV_HEADS + kv_head).to(tl.int64)
    places = (group * splits + split) * GROUP + row
    tl.store(statistics + places * 2, highest, mask=row < GROUP)
    tl.store(statistics + places * 2 + 1, total, mask=row < GROUP)
    tl.store(partial + places[:, None] * DIM_BLOCK + dim[None, :], result, mask=is_head)
    tl.debug_barrier()  # all warps have stored before the program counts itself
    if tl.atomic_add(arrivals + group, 1, sem="acq_rel") < num_splits - 1:
        return
    tl.store(arrivals + group, 0)
    tl.debug_barrier()
    of = tl.arange(0, GROUP_BLOCK)
    joined = _join(
        partial, statistics, group * splits * GROUP, num_splits, GROUP, GROUP_BLOCK, JOINED, DIM_BLOCK
    )
    its_target = out + (token * KV_HEADS + kv_head) * GROUP * HEAD_DIM + of[:, None] * HEAD_DIM + dim[None, :]
    is_there = (of[:, None] < GROUP) & (dim[None, :] < HEAD_DIM)
    tl.store(its_target, (joined * value_scale).to(out.dtype.element_ty), mask=is_there)


@dataclass(frozen=True)
class Singles:
    """Sequences with one token in a step: int32 [s] their tokens and their places in the batch; arrivals
    [s * K], zeros between launches. The rest is memory that every layer uses again.
    """

    tokens: torch.Tensor
    sequences: torch.Tensor
    num_splits: int
    partial: torch.Tensor
    statistics: torch.Tensor
    arrivals: torch.Tensor


def plan_singles(
    shape: HeadShape, tokens: torch.Tensor, sequences: torch.Tensor, max_blocks: int, block_size: int
) -> Singles:
    """Memory and splits for these sequences, whose longest may fill max_blocks blocks."""
    device = tokens.device
    groups = len(tokens) * shape.num_kv_heads
    num_splits = splits_of(groups, max_blocks * block_size, device)
    rows = shape.group * groups * num_splits
    dims = dim_block(shape.head_dim)
    return Singles(
        tokens,
        sequences,
        num_splits,
        partial=torch.empty(rows * dims if num_splits > 1 else 1, dtype=torch.float32, device=device),
        statistics=torch.empty(rows * 2, dtype=torch.float32, device=device),
        arrivals=torch.zeros(groups, dtype=torch.int32, device=device),
    )


_JOINED = 8  # splits that are joined at a time
_WAVES = 4  # programs for each multiprocessor, about as many as are resident
MIN_TILES = 4  # of keys, that are worth a program of their own


def splits_of(groups: int, max_len: int, device: torch.device) -> int:
    """How many programs share one sequence and KV head: enough to fill the device, whatever the lengths."""
    wanted = triton.cdiv(_WAVES * num_processors(device), groups)
    return max(1, min(triton.next_power_of_2(wanted), triton.cdiv(max_len, TILE * MIN_TILES), 64))


def attend_singles(
    shape: HeadShape,
    q: torch.Tensor,
    kv: torch.Tensor,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    layer: LayerAttention,
    singles: Singles,
    out: torch.Tensor,
) -> None:
    """Writes the rows of `singles` in out [t, H * head_dim]; q [t, H, head_dim], apart by q.stride(0)."""
    _decode[(shape.num_kv_heads, len(singles.tokens), singles.num_splits)](
        q,
        kv,
        block_table,
        lengths,
        singles.tokens,
        singles.sequences,
        out,
        singles.partial,
        singles.statistics,
        singles.arrivals,
        score_factor(shape, layer),
        layer.v_scale,
        q.stride(0),
        block_table.stride(0),
        singles.num_splits,
        layer.window,
        score_limit(shape),
        shape.num_kv_heads,
        shape.group,
        shape.head_dim,
        kv.shape[3],
        MIN_TILES,
        max(_ROWS, triton.next_power_of_2(shape.group)),
        triton.next_power_of_2(shape.group),
        _JOINED,
        TILE,
        dim_block(shape.head_dim),
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
    )
