"""silu(gate) * up in one pass: float32 [t, 2 * size] -> [t, size]."""

from __future__ import annotations

import numpy as np
import torch
from numba import prange

from pagetide.ops.cpu.compiled import fast_exp, kernel


@kernel
def _silu_mul(num_tokens, gate_up, out):  # type: ignore[no-untyped-def]
    size = out.shape[1]
    for token in prange(num_tokens):
        for i in range(size):
            gate = gate_up[token, i]
            out[token, i] = gate / (np.float32(1) + fast_exp(-gate)) * gate_up[token, size + i]


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    out = torch.empty((gate_up.shape[0], gate_up.shape[1] // 2), dtype=torch.float32)
    _silu_mul(out.shape[0], gate_up.numpy(), out.numpy())
    return out
