"""A linear layer: the checkpoint's format decides how it is stored, the device's operations how it is computed."""

from __future__ import annotations

import torch

from pagetide.ops.table import Ops


class Linear:
    """y = x @ weight.T + bias with weight [out, in]; x [t, in]."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, ops: Ops):
        self.weight = weight
        self._matmul = ops.make_matmul(weight, bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._matmul(x)
