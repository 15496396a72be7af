"""The set of functions that one device uses.

Chosen once, at load; it travels as an object in constructors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch

from pagetide.config import Settings
from pagetide.ops import reference
from pagetide.ops.attention import TorchAttention
from pagetide.ops.batch import Batch
from pagetide.ops.layers import (
    Affine,
    ComposedLayers,
    Embedding,
    EmbeddingWeights,
    LayerOps,
    Layers,
    LayerShape,
    LayerWeights,
    Matmul,
)

Tensor = torch.Tensor


@dataclass(frozen=True)
class Ops:
    """Signatures and shapes are those of ops/reference.py and ops/layers.py."""

    gather: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]
    make_embedding: Callable[[EmbeddingWeights], Embedding]
    make_layers: Callable[[LayerShape, Iterable[LayerWeights]], Layers]
    argmax: Callable[[Tensor], Tensor]
    sample: Callable[..., Tensor]
    penalize: Callable[..., None]
    edit: Callable[..., None]
    mask: Callable[[Tensor, Tensor, Tensor, Tensor], None]
    score: Callable[[Tensor, Tensor, int], list[Tensor]]


def torch_matmul(affine: Affine) -> Matmul:
    """x @ weight.T + bias in the weight's type; the result has x's."""
    weight, bias = affine.weight.values, affine.bias

    def matmul(x: Tensor, batch: Batch) -> Tensor:
        return linear(x, weight, bias)

    return matmul


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.nn.functional.linear(x.to(weight.dtype), weight, bias).to(x.dtype)


class TorchEmbedding:
    """Embedding in plain torch; activations have the norm's type."""

    def __init__(self, weights: EmbeddingWeights):
        self._weights = weights
        self._head = weights.embedding if weights.head is None else weights.head.values

    def embed(self, ids: Tensor) -> Tensor:
        return self._weights.embedding[ids].to(self._weights.norm.dtype)

    def logits(self, residual: Tensor) -> Tensor:
        normed = reference.rms_norm(residual, self._weights.norm, self._weights.eps)
        return linear(normed, self._head).float()


TORCH_LAYERS = LayerOps(reference.add_rms_norm, reference.silu_mul, torch_matmul, TorchAttention)

REFERENCE = Ops(
    gather=reference.gather,
    make_embedding=TorchEmbedding,
    make_layers=partial(ComposedLayers, TORCH_LAYERS),
    argmax=reference.argmax,
    sample=reference.sample,
    penalize=reference.penalize,
    edit=reference.edit,
    mask=reference.mask,
    score=reference.score,
)


def select_ops(device: torch.device, settings: Settings) -> Ops:
    """The fastest set that this device has; the reference set if the settings say so."""
    if device.type == "cpu" and settings.ops == "auto":
        from pagetide.ops.cpu.table import make_cpu_ops  # imports Numba, which a GPU does not need

        return make_cpu_ops()
    return REFERENCE
