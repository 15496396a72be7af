"""How keys and values lie in memory: the size of a block, and nothing else.

One pool holds all layers: [num_layers, num_blocks, 2 (keys, values), num_kv_heads, block_size * head_dim]. What is in a block of one head is
the attention's own affair. In plain torch: [block_size, head_dim]. In the CPU's kernels: pages of 16 tokens, each packed like a weight matrix
(ops/cpu/tiles.py), so that a page's scores are one vector:

            bfloat16                          float32
   keys     [head_dim / 2, 16, 2]             [head_dim, 16]
   values   [head_dim / 16, 8, 16, 2]         [head_dim / 16, 16, 16]      (the 16 in the middle, or 8 pairs: tokens)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

PAGE = 16  # tokens that the CPU's kernels take at a time


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
