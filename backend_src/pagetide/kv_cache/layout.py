"""How keys and values lie in memory: the size of a block, and nothing else.

One pool holds all layers: [num_layers, num_blocks, 2 (keys, values), num_kv_heads, block_size * head_dim]. In a block of one head
   keys stand as [head_dim, block_size]: the scores of a block's tokens are one vector, summed over head_dim without a reduction;
   values stand as [block_size, head_dim].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class KVLayout:
    """Shape and dtype of the KV pool. Sizes are in tokens, heads and elements; bytes where the name says so."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers, keys and values."""
        return self.num_layers * 2 * self.num_kv_heads * self.block_size * self.head_dim * self.dtype.itemsize

    def pool_shape(self, num_blocks: int) -> tuple[int, ...]:
        return (self.num_layers, num_blocks, 2, self.num_kv_heads, self.block_size * self.head_dim)


def keys_of(kv: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The keys of one layer of the pool: [num_blocks, num_kv_heads, head_dim, block_size], a view."""
    return kv[:, 0].unflatten(-1, (head_dim, -1))


def values_of(kv: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The values of one layer of the pool: [num_blocks, num_kv_heads, block_size, head_dim], a view."""
    return kv[:, 1].unflatten(-1, (-1, head_dim))
