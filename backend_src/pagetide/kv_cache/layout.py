"""How much memory keys and values take: the shape of one block is the attention's own affair.

Each attention (ops/attention.py) says what a block of one layer looks like to it:

   plain torch         [2 (keys, values), num_kv_heads, block_size, head_dim]
   kernels of a CPU    [2, num_kv_heads, block_size * head_dim], in pages of 16 tokens, each packed like a
                       weight matrix (ops/cpu/tiles.py), so that a page's scores are one vector:

               bfloat16                          float32
      keys     [head_dim / 2, 16, 2]             [head_dim, 16]
      values   [head_dim / 16, 8, 16, 2]         [head_dim / 16, 16, 16]      (the 16 in the middle: tokens)

                       as 8-bit integers: bytes, a page's scales before its codes (ops/cpu/kv_tile.py)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

PAGE = 16  # tokens that the CPU's kernels take at a time


@dataclass(frozen=True)
class KVLayout:
    """Shape and dtype of the KV pool, which holds all layers. block_shape: of one block of one layer."""

    num_layers: int
    block_shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers, keys and values."""
        return self.num_layers * math.prod(self.block_shape) * self.dtype.itemsize

    def pool_shape(self, num_blocks: int) -> tuple[int, ...]:
        """All blocks of all layers: [layers, blocks, *block_shape]."""
        return (self.num_layers, num_blocks, *self.block_shape)
