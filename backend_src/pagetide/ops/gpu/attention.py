"""Attention of a GPU: a launch for sequences with a single token, one for prompt chunks, over one layout."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from pagetide.ops.attention import HeadShape, LayerAttention
from pagetide.ops.batch import Batch, to_device
from pagetide.ops.gpu.decode import Singles, attend_singles, plan_singles
from pagetide.ops.gpu.prefill import attend_chunks, tokens_of_tile
from pagetide.ops.gpu.rotary import rotate_and_write


@dataclass(frozen=True)
class AttentionPlan:
    """singles: None where no sequence has a single token; tiles: of attend_chunks, None where all have."""

    singles: Singles | None
    tiles: torch.Tensor | None


class PagedAttention:
    """AttentionBackend in the Triton language. dtype: of queries, keys and values."""

    def __init__(self, dtype: torch.dtype, shape: HeadShape):
        self._dtype = dtype
        self._shape = shape

    def block_shape(self, block_size: int) -> tuple[int, ...]:
        """[keys and values, KV heads, tokens, head size]: what one head reads of a block lies together."""
        return (2, self._shape.num_kv_heads, block_size, self._shape.head_dim)

    def plan(self, batch: Batch) -> AttentionPlan:
        """The only thing that a step's kernels do not find on the device: which sequences have how many
        tokens.
        """
        device = batch.ids.device
        counts = batch.counts.astype(np.int32)
        if (counts == 1).all():
            tokens = sequences = torch.arange(len(counts), dtype=torch.int32, device=device)
            return AttentionPlan(self._plan_singles(tokens, sequences, batch), None)
        firsts = np.cumsum(counts, dtype=np.int32) - counts
        alone = np.flatnonzero(counts == 1).astype(np.int32)
        tiles = chunk_tiles(firsts, counts, batch.starts, tokens_of_tile(self._shape, self._dtype))
        packed = to_device(np.concatenate([tiles.ravel(), firsts[alone], alone]), device)
        of_tiles, tokens, sequences = packed.split([tiles.size, len(alone), len(alone)])
        singles = self._plan_singles(tokens, sequences, batch) if len(alone) else None
        return AttentionPlan(singles, of_tiles.view(-1, 4))

    def _plan_singles(self, tokens: torch.Tensor, sequences: torch.Tensor, batch: Batch) -> Singles:
        return plan_singles(self._shape, tokens, sequences, batch.block_table.shape[1], batch.block_size)

    def write(self, qkv: torch.Tensor, kv: torch.Tensor, layer: LayerAttention, batch: Batch) -> torch.Tensor:
        return rotate_and_write(self._shape, qkv, kv, layer, batch)

    def attend(
        self, q: torch.Tensor, kv: torch.Tensor, layer: LayerAttention, batch: Batch, plan: AttentionPlan
    ) -> torch.Tensor:
        out = torch.empty(
            (len(q), self._shape.num_heads * self._shape.head_dim), dtype=q.dtype, device=q.device
        )
        table = batch.block_table
        if plan.singles is not None:
            attend_singles(self._shape, q, kv, table, batch.lengths, layer, plan.singles, out)
        if plan.tiles is not None:
            attend_chunks(self._shape, q, kv, table, layer, plan.tiles, out)
        return out


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
