"""How keys and values lie in memory: the size of a block, and nothing else.

One pool holds all layers: [num_layers, num_blocks, 2 (key, value), num_kv_heads, block_size, head_dim].
The keys of one (block, head) are contiguous, [block_size, head_dim]: a decode kernel streams through them.
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
        return (self.num_layers, num_blocks, 2, self.num_kv_heads, self.block_size, self.head_dim)
