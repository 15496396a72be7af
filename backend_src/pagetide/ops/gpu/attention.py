"""Attention of a GPU: a launch for sequences with a single token, one for prompt chunks, over one layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from pagetide.ops.attention import HeadShape, LayerAttention
from pagetide.ops.batch import Batch, to_device
from pagetide.ops.gpu.decode import Singles, attend_singles, plan_singles
from pagetide.ops.gpu.prefill import attend_chunks, chunk_tiles, tokens_of_tile
from pagetide.ops.gpu.rotary import rotate_and_write


class ChunkAttention(Protocol):
    """Attention of a step's sequences with more than one token."""

    def takes(self, counts: np.ndarray) -> np.ndarray:
        """bool [n]: the sequences that it attends to, at least those with more than one token.

        counts int32 [n].
        """

    def plan(self, batch: Batch, firsts: np.ndarray, taken: np.ndarray) -> Any:
        """Once per step: what attend() needs. firsts int32 [n]: each sequence's first token in the step."""

    def attend(
        self,
        q: torch.Tensor,
        kv: torch.Tensor,
        layer: LayerAttention,
        batch: Batch,
        plan: Any,
        out: torch.Tensor,
    ) -> None:
        """Writes the rows of the taken sequences' tokens in out [t, H * head_dim]. The others' rows of
        q [t, H, head_dim] are not its own.
        """


MakeChunks = Callable[[HeadShape, torch.dtype], ChunkAttention]


class TiledChunks:
    """ChunkAttention by the engine's own kernel."""

    def __init__(self, shape: HeadShape, dtype: torch.dtype):
        self._shape = shape
        self._tokens = tokens_of_tile(shape, dtype)

    def takes(self, counts: np.ndarray) -> np.ndarray:
        return counts > 1

    def plan(self, batch: Batch, firsts: np.ndarray, taken: np.ndarray) -> torch.Tensor:
        return to_device(chunk_tiles(firsts, batch.counts, batch.starts, self._tokens), batch.ids.device)

    def attend(
        self,
        q: torch.Tensor,
        kv: torch.Tensor,
        layer: LayerAttention,
        batch: Batch,
        plan: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        attend_chunks(self._shape, q, kv, batch.block_table, layer, plan, out)


@dataclass(frozen=True)
class AttentionPlan:
    """singles: None where no sequence with a single token is left to them; chunks: what ChunkAttention
    planned, None where it has nothing to do.
    """

    singles: Singles | None
    chunks: Any


class PagedAttention:
    """AttentionBackend in the Triton language. dtype: of queries; make_chunks: of what attends to chunks."""

    def __init__(
        self,
        dtype: torch.dtype,
        make_chunks: Callable[[HeadShape, torch.dtype], ChunkAttention],
        shape: HeadShape,
    ):
        self._shape = shape
        self._chunks = make_chunks(shape, dtype)

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
        taken = self._chunks.takes(counts)
        chunks = self._chunks.plan(batch, firsts, taken)
        left = np.flatnonzero(~taken).astype(np.int32)
        if not len(left):
            return AttentionPlan(None, chunks)
        tokens, sequences = to_device(np.stack([firsts[left], left]), device)
        return AttentionPlan(self._plan_singles(tokens, sequences, batch), chunks)

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
        if plan.singles is not None:
            attend_singles(self._shape, q, kv, batch.block_table, batch.lengths, layer, plan.singles, out)
        if plan.chunks is not None:
            self._chunks.attend(q, kv, layer, batch, plan.chunks, out)
        return out
