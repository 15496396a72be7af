"""Copies of KV blocks: between blocks of the device, and to and from the host's memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 1024  # words that a program copies at a time


@triton.jit(do_not_specialize_on_alignment=["pairs"])
def _copy_blocks(source, target, pairs, source_layer, target_layer, words, BLOCK: tl.constexpr):
    pair, layer = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at = tl.arange(0, BLOCK)
    read = source + layer * source_layer + tl.load(pairs + 2 * pair).to(tl.int64) * words
    write = target + layer * target_layer + tl.load(pairs + 2 * pair + 1).to(tl.int64) * words
    for begin in range(0, words, BLOCK):
        inside = begin + at < words
        tl.store(write + begin + at, tl.load(read + begin + at, mask=inside), mask=inside)


def copy_blocks(source: torch.Tensor, target: torch.Tensor, pairs: torch.Tensor) -> None:
    """reference.copy_blocks, all layers in one launch. A pool in the host's memory must be pinned: the device
    reads and writes it where it is.
    """
    layers = len(source)
    read, write = (pool.view(layers, pool.shape[1], -1) for pool in (source, target))
    if read.shape[2] * read.dtype.itemsize % 8 == 0:  # words of 8 bytes, two of which make one access
        read, write = read.view(torch.int64), write.view(torch.int64)
    _copy_blocks[(len(pairs), layers)](
        read, write, pairs, read.stride(0), write.stride(0), read.shape[2], _BLOCK, num_warps=4
    )
