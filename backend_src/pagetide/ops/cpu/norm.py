"""Residual addition and RMS norm in one pass over memory. x float32 [t, size], weight float32 [size]."""

from __future__ import annotations

import numpy as np
import torch
from numba import prange

from pagetide.ops.cpu.compiled import kernel


@kernel
def _add_rms_norm(num_tokens, x, residual, weight, eps, out):  # type: ignore[no-untyped-def]
    size = x.shape[1]
    for token in prange(num_tokens):
        squares = np.float32(0)
        for i in range(size):
            value = residual[token, i] + x[token, i]
            residual[token, i] = value
            squares += value * value
        scale = np.float32(1) / np.sqrt(squares / np.float32(size) + eps)
        for i in range(size):
            out[token, i] = residual[token, i] * scale * weight[i]


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Adds x to the residual, in place, and returns the norm of the sum."""
    out = torch.empty_like(x)
    _add_rms_norm(x.shape[0], x.numpy(), residual.numpy(), weight.numpy(), np.float32(eps), out.numpy())
    return out
