"""The set of functions that one device uses. Chosen once, at load; it travels as an object in constructors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from pagetide.config import Settings
from pagetide.ops import reference
from pagetide.ops.attention import AttentionBackend, HeadShape, TorchAttention

Tensor = torch.Tensor
Matmul = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Ops:
    """Signatures and shapes are those of ops/reference.py. make_matmul: (weight [out, in], bias [out] or None) -> x [t, in] -> [t, out]."""

    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    silu_mul: Callable[[Tensor], Tensor]
    argmax: Callable[[Tensor], Tensor]
    sample: Callable[..., Tensor]
    penalize: Callable[..., None]
    edit: Callable[..., None]
    mask: Callable[[Tensor, Tensor, Tensor, Tensor], None]
    score: Callable[[Tensor, Tensor, int], list[Tensor]]
    make_matmul: Callable[[Tensor, Tensor | None], Matmul]
    make_attention: Callable[[HeadShape], AttentionBackend]


def reference_matmul(weight: Tensor, bias: Tensor | None) -> Matmul:
    """x @ weight.T + bias in the weight's type; the result has x's."""

    def matmul(x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x.to(weight.dtype), weight, bias).to(x.dtype)

    return matmul


REFERENCE = Ops(
    add_rms_norm=reference.add_rms_norm,
    silu_mul=reference.silu_mul,
    argmax=reference.argmax,
    sample=reference.sample,
    penalize=reference.penalize,
    edit=reference.edit,
    mask=reference.mask,
    score=reference.score,
    make_matmul=reference_matmul,
    make_attention=TorchAttention,
)


def select_ops(device: torch.device, settings: Settings) -> Ops:
    """The fastest set that this device has; the reference set if the settings say so."""
    if device.type == "cpu" and settings.ops == "auto":
        from pagetide.ops.cpu.table import make_cpu_ops  # imports Numba, which a GPU does not need

        return make_cpu_ops(settings.cache_path)
    return REFERENCE
