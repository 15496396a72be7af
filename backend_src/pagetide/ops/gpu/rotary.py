"""What stands between the QKV product and attention, in one pass: QK-norm, rotary, the cache's write."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pagetide.ops.attention import HeadShape, LayerAttention
from pagetide.ops.batch import Batch
from pagetide.ops.gpu.device import FP8, FP8_MAX

_HEADS = 8  # that a program takes


@triton.jit(do_not_specialize_on_alignment=["positions", "slots"])
def _rotate_and_write(
    qkv,
    kv,
    q_norm,
    k_norm,
    cos_sin,
    positions,
    slots,
    eps,
    k_factor,
    v_factor,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NORMS: tl.constexpr,
    MOST: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
):
    half: tl.constexpr = HEAD_DIM // 2
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS_BLOCK + tl.arange(0, HEADS_BLOCK)[:, None]
    at = tl.arange(0, HALF_BLOCK)[None, :]
    inside = (head < HEADS + 2 * KV_HEADS) & (at < half)
    is_query = head < HEADS
    is_value = head >= HEADS + KV_HEADS
    source = qkv + token * (HEADS + 2 * KV_HEADS) * HEAD_DIM + head * HEAD_DIM + at
    first = tl.load(source, mask=inside, other=0.0)
    second = tl.load(source + half, mask=inside, other=0.0)
    low, high = first.to(tl.float32), second.to(tl.float32)
    if NORMS:
        scale = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / HEAD_DIM + eps)[:, None]
        of_query, of_key = inside & is_query, inside & (head >= HEADS) & (head < HEADS + KV_HEADS)
        low_weight = tl.load(q_norm + at + head * 0, mask=of_query, other=0.0).to(tl.float32)
        low_weight += tl.load(k_norm + at + head * 0, mask=of_key, other=0.0).to(tl.float32)
        high_weight = tl.load(q_norm + half + at + head * 0, mask=of_query, other=0.0).to(tl.float32)
        high_weight += tl.load(k_norm + half + at + head * 0, mask=of_key, other=0.0).to(tl.float32)
        low, high = low * scale * low_weight, high * scale * high_weight
    position = tl.load(positions + token)
    cos = tl.load(cos_sin + position * HEAD_DIM + at, mask=at < half, other=0.0)
    sin = tl.load(cos_sin + position * HEAD_DIM + half + at, mask=at < half, other=0.0)
    turned_low = (low * cos - high * sin).to(first.dtype)
    turned_high = (high * cos + low * sin).to(first.dtype)
    tl.store(source, turned_low, mask=inside & is_query)
    tl.store(source + half, turned_high, mask=inside & is_query)
    slot = tl.load(slots + token)
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    # A block holds [keys and values, KV heads, tokens, head size]; heads from HEADS on lie in this order too.
    target = kv + ((block * 2 * KV_HEADS + head - HEADS) * BLOCK_SIZE + offset) * HEAD_DIM + at
    is_kept = inside & (head >= HEADS) & (slot >= 0)
    kept_low, kept_high = tl.where(is_value, first, turned_low), tl.where(is_value, second, turned_high)
    if MOST > 0:  # a larger one would become NaN
        factor = tl.where(is_value, v_factor, k_factor)
        kept_low = tl.clamp(kept_low.to(tl.float32) * factor, -MOST, MOST, propagate_nan=tl.PropagateNan.ALL)
        kept_high = tl.clamp(
            kept_high.to(tl.float32) * factor, -MOST, MOST, propagate_nan=tl.PropagateNan.ALL
        )
    tl.store(target, kept_low.to(kv.dtype.element_ty), mask=is_kept)
    tl.store(target + half, kept_high.to(kv.dtype.element_ty), mask=is_kept)


def rotate_and_write(
    shape: HeadShape, qkv: torch.Tensor, kv: torch.Tensor, layer: LayerAttention, batch: Batch
) -> torch.Tensor:
    """AttentionBackend.write for pool blocks [2, K, block_size, head_dim]. The queries stay in qkv: a view
    [t, H, head_dim] of it is returned. Tokens with a slot below 0 are not written.
    """
    heads = shape.num_heads + 2 * shape.num_kv_heads
    _rotate_and_write[(len(qkv), triton.cdiv(heads, _HEADS))](
        qkv,
        kv,
        layer.q_norm,
        layer.k_norm,
        layer.cos_sin,
        batch.positions,
        batch.slot_mapping,
        layer.eps,
        1 / layer.k_scale,
        1 / layer.v_scale,
        shape.num_heads,
        shape.num_kv_heads,
        shape.head_dim,
        kv.shape[3],
        layer.q_norm is not None,
        FP8_MAX if kv.dtype is FP8 else 0.0,
        triton.next_power_of_2(shape.head_dim // 2),
        _HEADS,
        num_warps=2,
    )
    return qkv.view(-1, heads, shape.head_dim)[:, : shape.num_heads]
