"""Owns the memory of the KV cache: on torch's memory, or on a GPU on CuPy's, seen by torch through DLPack."""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
import torch

from pagetide.kv_cache.layout import KVLayout


class KVStore(Protocol):
    """The pool of KV blocks of one device."""

    pool: torch.Tensor  # [num_layers, num_blocks, *block_shape]

    def copy_blocks(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """Copies whole blocks, all layers, in stream order.

        Both int32 [num_copies]; no target is also a source.
        """


class TorchStore:
    """The pool as one torch tensor."""

    def __init__(self, layout: KVLayout, num_blocks: int, device: torch.device):
        # Zeros, not empty: masked reads of memory that was never written must not meet NaN.
        if device.type == "cpu":
            # NumPy's zeros are pages that the kernel brings when they are first used; torch's would take
            # all memory now.
            memory = np.zeros(num_blocks * layout.block_bytes, np.uint8)
            self.pool = torch.from_numpy(memory).view(layout.dtype).view(layout.pool_shape(num_blocks))
        else:
            self.pool = torch.zeros(layout.pool_shape(num_blocks), dtype=layout.dtype, device=device)

    def copy_blocks(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        self.pool[:, targets] = self.pool[:, sources]


class CupyStore(TorchStore):
    """The pool on CuPy's memory, seen by torch without a copy. No kernel of CuPy's uses it yet."""

    def __init__(self, layout: KVLayout, num_blocks: int, device: torch.device):
        import cupy  # the GPU image's; absent on machines without a GPU

        shape = layout.pool_shape(num_blocks)
        with cupy.cuda.Device(device.index or 0):
            # Beside CuPy's memory pool, which would keep the memory for itself afterwards. CuPy has no
            # bfloat16: bytes are handed over, and torch gives them their type.
            size = math.prod(shape) * layout.dtype.itemsize
            memory = cupy.cuda.MemoryPointer(cupy.cuda.Memory(size), 0)
            self._owner = cupy.ndarray(size, dtype=cupy.uint8, memptr=memory)
            self._owner.fill(0)
        self.pool = torch.from_dlpack(self._owner).view(layout.dtype).view(shape)


def make_store(layout: KVLayout, num_blocks: int, device: torch.device) -> KVStore:
    """CupyStore on a GPU where CuPy is installed, TorchStore otherwise."""
    if device.type == "cuda":
        try:
            return CupyStore(layout, num_blocks, device)
        except ImportError:
            return TorchStore(layout, num_blocks, device)
    return TorchStore(layout, num_blocks, device)
