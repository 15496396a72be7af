"""The gated MLP's activation."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 1024


@triton.jit
def _gated(gate_up, out, SIZE: tl.constexpr, IS_GELU: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < SIZE
    row = tl.program_id(0).to(tl.int64)
    gate = tl.load(gate_up + row * 2 * SIZE + at, mask=inside, other=0.0)
    up = tl.load(gate_up + row * 2 * SIZE + SIZE + at, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    slope = wide
    if IS_GELU:  # by its approximation (arXiv:1606.08415): (1 + tanh(x)) / 2 is sigmoid(2 x)
        slope = wide * (1.5957691216 + 0.0713548163 * wide * wide)
    opened = (wide * tl.sigmoid(slope)).to(gate.dtype).to(tl.float32)
    tl.store(out + row * SIZE + at, (opened * up.to(tl.float32)).to(gate.dtype), mask=inside)


def gated(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """reference.gated in one pass; gate_up [t, 2 * size], contiguous."""
    tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((tokens, size), dtype=gate_up.dtype, device=gate_up.device)
    grid = (tokens, triton.cdiv(size, _BLOCK))
    _gated[grid](gate_up, out, size, activation == "gelu", _BLOCK, num_warps=4)
    return out
