"""Attention over the paged KV cache: the interface that every backend has, and the version in plain torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from pagetide.ops import reference
from pagetide.ops.batch import Batch


@dataclass(frozen=True)
class HeadShape:
    """Sizes that all layers share. query_size: scores are divided by its root, 0: head_dim; soft_cap: what
    they cannot exceed then (arXiv:2408.00118), 0: nothing.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    query_size: float = 0.0
    soft_cap: float = 0.0

    @property
    def scale(self) -> float:
        """What scores are multiplied by."""
        return float((self.query_size or self.head_dim) ** -0.5)

    @property
    def group(self) -> int:
        """Query heads for each KV head."""
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True)
class LayerAttention:
    """What attention needs of one layer. window: tokens that a token sees, itself included; 0: all.

    cos_sin: float32 [max_len, head_dim], cosines then sines. q_norm, k_norm: weights [head_dim] of the RMS
    norm over a head, or None. k_scale, v_scale: what keys and values are divided by where they are kept as
    FP8.
    """

    cos_sin: torch.Tensor
    window: int
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    eps: float
    k_scale: float = 1.0
    v_scale: float = 1.0


class AttentionBackend(Protocol):
    """Paged attention. kv is one layer of the pool: [num_blocks, *block_shape]."""

    def block_shape(self, block_size: int) -> tuple[int, ...]:
        """The shape of a block of block_size tokens of one layer, keys and values."""

    def plan(self, batch: Batch) -> Any:
        """Once per step: what attend() needs in every layer beyond the batch's tensors."""

    def write(self, qkv: torch.Tensor, kv: torch.Tensor, layer: LayerAttention, batch: Batch) -> torch.Tensor:
        """QK-norm, rotary, and the write of keys and values into the step's slots.

        qkv [t, (H + 2K) * head_dim] -> q [t, H, head_dim].
        """

    def attend(
        self, q: torch.Tensor, kv: torch.Tensor, layer: LayerAttention, batch: Batch, plan: Any
    ) -> torch.Tensor:
        """Each query against its sequence's tokens up to itself. plan: what plan() gave.

        q [t, H, head_dim] -> [t, H * head_dim].
        """


class TorchAttention:
    """Gathers each sequence's keys and values; sequences with one token go together, longer chunks one by
    one.
    """

    def __init__(self, shape: HeadShape):
        self._shape = shape

    def block_shape(self, block_size: int) -> tuple[int, ...]:
        """[keys and values, KV heads, tokens, head size]."""
        return (2, self._shape.num_kv_heads, block_size, self._shape.head_dim)

    def plan(self, batch: Batch) -> list[tuple[int, int]]:
        """(first token, sequence) of each sequence."""
        first = 0
        spans = []
        for sequence, count in enumerate(batch.counts.tolist()):
            spans.append((first, sequence))
            first += count
        return spans

    def write(self, qkv: torch.Tensor, kv: torch.Tensor, layer: LayerAttention, batch: Batch) -> torch.Tensor:
        shape = self._shape
        heads = qkv.view(-1, shape.num_heads + 2 * shape.num_kv_heads, shape.head_dim)
        q, k, v = heads.split([shape.num_heads, shape.num_kv_heads, shape.num_kv_heads], dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = (
                reference.rms_norm(q, layer.q_norm, layer.eps),
                reference.rms_norm(k, layer.k_norm, layer.eps),
            )
        cos_sin = layer.cos_sin[batch.positions]
        q, k = reference.apply_rotary(q, cos_sin), reference.apply_rotary(k, cos_sin)
        block, offset = batch.slot_mapping // kv.shape[3], batch.slot_mapping % kv.shape[3]
        kv[block, 0, :, offset] = _kept(k, layer.k_scale, kv.dtype)
        kv[block, 1, :, offset] = _kept(v, layer.v_scale, kv.dtype)
        return q

    def attend(
        self,
        q: torch.Tensor,
        kv: torch.Tensor,
        layer: LayerAttention,
        batch: Batch,
        plan: list[tuple[int, int]],
    ) -> torch.Tensor:
        out = torch.empty_like(q)
        singles = [(first, sequence) for first, sequence in plan if batch.counts[sequence] == 1]
        if singles:
            self._attend_singles(q, kv, layer, batch, singles, out)
        for first, sequence in plan:
            if batch.counts[sequence] > 1:
                self._attend_chunk(q, kv, layer, batch, first, sequence, out)
        return out.flatten(1)

    def _attend_singles(
        self,
        q: torch.Tensor,
        kv: torch.Tensor,
        layer: LayerAttention,
        batch: Batch,
        singles: list[tuple[int, int]],
        out: torch.Tensor,
    ) -> None:
        longest = max(int(batch.starts[sequence]) + 1 for _, sequence in singles)
        tokens = torch.tensor([first for first, _ in singles], device=q.device)
        sequences = torch.tensor([sequence for _, sequence in singles], device=q.device)
        keys, values = self._gather(kv, layer, batch.block_table[sequences], longest, q.dtype)
        at = torch.arange(longest, device=q.device)
        position = batch.positions[tokens].unsqueeze(1)
        visible = at <= position
        if layer.window:
            visible &= at > position - layer.window
        result = attend_visible(q[tokens].unsqueeze(2), keys, values, visible[:, None, None, :], self._shape)
        out[tokens] = result.squeeze(2)

    def _attend_chunk(
        self,
        q: torch.Tensor,
        kv: torch.Tensor,
        layer: LayerAttention,
        batch: Batch,
        first: int,
        sequence: int,
        out: torch.Tensor,
    ) -> None:
        count, start = int(batch.counts[sequence]), int(batch.starts[sequence])
        table = batch.block_table[sequence : sequence + 1]
        keys, values = self._gather(kv, layer, table, start + count, q.dtype)
        queries = q[first : first + count].transpose(0, 1).unsqueeze(0)
        out[first : first + count] = (
            attend_chunk(queries, keys, values, start, layer.window, self._shape).squeeze(0).transpose(0, 1)
        )

    def _gather(
        self,
        kv: torch.Tensor,
        layer: LayerAttention,
        block_table: torch.Tensor,
        length: int,
        dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the first `length` tokens of each sequence: [n, num_kv_heads, length,
        head_dim] each.
        """
        gathered = kv[
            block_table[:, : -(-length // kv.shape[3])].long()
        ]  # [n, blocks, 2, heads, block_size, head_dim]
        keys, values = gathered.permute(2, 0, 3, 1, 4, 5).flatten(3, 4)[:, :, :, :length].to(dtype)
        if kv.dtype is torch.float8_e4m3fn:
            keys, values = keys * layer.k_scale, values * layer.v_scale
        return keys, values


def _kept(x: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """Keys or values as the cache has them; FP8 has no infinity that what is too large could become."""
    if dtype is not torch.float8_e4m3fn:
        return x.to(dtype)
    most = torch.finfo(dtype).max
    return (x.float() / scale).clamp(-most, most).to(dtype)


def attend_chunk(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    start: int,
    window: int,
    shape: HeadShape,
) -> torch.Tensor:
    """Causal attention of a chunk whose first query stands at position start.

    queries [1, H, count, head_dim], keys [1, K, length, head_dim].
    """
    count, length = queries.shape[2], keys.shape[2]
    at = torch.arange(length, device=queries.device)
    position = torch.arange(start, start + count, device=queries.device).unsqueeze(1)
    visible = at <= position
    if window:
        visible &= at > position - window
    return attend_visible(queries, keys, values, visible, shape)


def attend_visible(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, visible: torch.Tensor, shape: HeadShape
) -> torch.Tensor:
    """queries [n, H, count, head_dim], keys and values [n, K, length, head_dim], visible: which key each
    query sees, [count, length] or with as many dimensions as the scores.
    """
    if not shape.soft_cap:
        return F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=visible, enable_gqa=True, scale=shape.scale
        )
    keys, values = (x.repeat_interleave(shape.group, dim=1) for x in (keys, values))
    scores = (queries @ keys.transpose(2, 3)).float() * shape.scale
    scores = shape.soft_cap * torch.tanh(scores / shape.soft_cap)
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return weights.to(values.dtype) @ values
