"""Owns the memory of the KV cache: on torch's memory, or on a GPU on CuPy's, seen by torch through DLPack."""

from __future__ import annotations

import logging
from typing import Protocol

import numpy as np
import torch

from pagetide.kv_cache.layout import KVLayout

log = logging.getLogger("pagetide.kv_cache")


class KVStore(Protocol):
    """The pools of KV blocks of one device: its own, and one in the host's memory for what does not fit."""

    pool: torch.Tensor  # [num_layers, num_blocks, *block_shape]
    host_pool: torch.Tensor  # [num_layers, num_host_blocks, *block_shape]


class TorchStore:
    """The pools as torch tensors."""

    def __init__(self, layout: KVLayout, num_blocks: int, device: torch.device, num_host_blocks: int = 0):
        # Zeros, not empty: masked reads of memory that was never written must not meet NaN.
        if device.type == "cpu":
            self.pool, self.host_pool = (
                _lazy_zeros(layout, number) for number in (num_blocks, num_host_blocks)
            )
        else:
            self.pool = torch.zeros(layout.pool_shape(num_blocks), dtype=layout.dtype, device=device)
            shape = layout.pool_shape(num_host_blocks)
            self.host_pool = torch.zeros(shape, dtype=layout.dtype, pin_memory=num_host_blocks > 0)


def _lazy_zeros(layout: KVLayout, num_blocks: int) -> torch.Tensor:
    """NumPy's zeros are pages that the kernel brings when they are first used; torch's would take all memory
    now.
    """
    memory = np.zeros(num_blocks * layout.block_bytes, np.uint8)
    return _typed(torch.from_numpy(memory), layout, num_blocks)


class CupyStore:
    """The pools on CuPy's memory, seen by torch without a copy; the host's is pinned, and exactly as large as
    asked for (torch's pinned memory is rounded up to a power of two).
    """

    def __init__(self, layout: KVLayout, num_blocks: int, device: torch.device, num_host_blocks: int = 0):
        import cupy  # the GPU image's; absent on machines without a GPU

        size = num_blocks * layout.block_bytes
        with cupy.cuda.Device(device.index or 0):
            # Beside CuPy's memory pool, which would keep the memory for itself afterwards. CuPy has no
            # bfloat16: bytes are handed over, and torch gives them their type.
            memory = cupy.cuda.MemoryPointer(cupy.cuda.Memory(size), 0)
            self._owner = cupy.ndarray(size, dtype=cupy.uint8, memptr=memory)
            self._owner.fill(0)
            host_size = num_host_blocks * layout.block_bytes
            self._host_owner = cupy.cuda.PinnedMemoryPointer(cupy.cuda.PinnedMemory(max(host_size, 1)), 0)
        self.pool = _typed(torch.from_dlpack(self._owner), layout, num_blocks)
        host = np.frombuffer(self._host_owner, np.uint8, host_size)
        self.host_pool = _typed(torch.from_numpy(host), layout, num_host_blocks)


def _typed(memory: torch.Tensor, layout: KVLayout, num_blocks: int) -> torch.Tensor:
    """Bytes as a pool of blocks."""
    if not num_blocks:  # torch cannot say of no bytes that they are numbers
        return torch.empty(layout.pool_shape(0), dtype=layout.dtype)
    return memory.view(layout.dtype).view(layout.pool_shape(num_blocks))


def make_store(layout: KVLayout, num_blocks: int, device: torch.device, num_host_blocks: int = 0) -> KVStore:
    """CupyStore on a GPU where CuPy is installed, TorchStore otherwise."""
    if device.type == "cuda":
        try:
            return CupyStore(layout, num_blocks, device, num_host_blocks)
        except ImportError as error:
            log.warning(
                "the KV cache lies in torch's memory: CuPy, which should own it, is missing (%s)", error
            )
    return TorchStore(layout, num_blocks, device, num_host_blocks)
