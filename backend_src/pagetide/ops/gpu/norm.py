"""RMS norm over rows, with the residual's addition in the same pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _add_rms_norm(x, residual, weight, out, eps, SIZE: tl.constexpr, BLOCK: tl.constexpr, ADDS: tl.constexpr):
    at = tl.arange(0, BLOCK)
    inside = at < SIZE
    row = tl.program_id(0).to(tl.int64) * SIZE
    total = tl.load(residual + row + at, mask=inside, other=0.0)
    if ADDS:
        update = tl.load(x + row + at, mask=inside, other=0.0)
        total = (total.to(tl.float32) + update.to(tl.float32)).to(total.dtype)
        tl.store(residual + row + at, total, mask=inside)
    wide = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide) / SIZE + eps)
    factors = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row + at, (wide * scale * factors).to(total.dtype), mask=inside)


def add_rms_norm(
    x: torch.Tensor | None, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """reference.add_rms_norm in one pass; without x the norm alone. x, residual [t, size], contiguous."""
    tokens, size = residual.shape
    out = torch.empty_like(residual)
    block = triton.next_power_of_2(size)
    _add_rms_norm[(tokens,)](
        x, residual, weight, out, eps, size, block, x is not None, num_warps=max(1, min(8, block // 512))
    )
    return out
