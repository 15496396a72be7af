"""The operations of any device in plain torch: what a device without kernels of its own uses."""

from __future__ import annotations

from functools import partial

import torch

from pagetide.ops import reference
from pagetide.ops.attention import TorchAttention
from pagetide.ops.layers import Affine, ComposedLayers, EmbeddingWeights, LayerOps, Matmul
from pagetide.ops.table import Ops

Tensor = torch.Tensor


def torch_matmul(affine: Affine) -> Matmul:
    """x @ weight.T + bias in the weight's type; the result has x's."""
    weight, bias = affine.weight.dense(), affine.bias

    return lambda x: linear(x, weight, bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [t, inputs] @ weight [outputs, inputs].T + bias [outputs] in the weight's type, returned in x's."""
    return torch.nn.functional.linear(x.to(weight.dtype), weight, bias).to(x.dtype)


class TorchEmbedding:
    """Embedding in plain torch; activations have the norm's type."""

    def __init__(self, weights: EmbeddingWeights):
        self._weights = weights
        self._embedding = weights.embedding.dense()
        self._head = self._embedding if weights.head is None else weights.head.dense()

    def embed(self, ids: Tensor) -> Tensor:
        return self._embedding[ids].to(self._weights.norm.dtype)

    def logits(self, residual: Tensor) -> Tensor:
        normed = reference.rms_norm(residual, self._weights.norm, self._weights.eps)
        return linear(normed, self._head).float()


TORCH_LAYERS = LayerOps(reference.add_rms_norm, reference.gated, torch_matmul, TorchAttention)

REFERENCE = Ops(
    can_record=False,
    gather=reference.gather,
    make_embedding=TorchEmbedding,
    make_layers=partial(ComposedLayers, TORCH_LAYERS),
    argmax=reference.argmax,
    sample=reference.sample,
    penalize=reference.penalize,
    edit=reference.edit,
    mask=reference.mask,
    copy_blocks=reference.copy_blocks,
    set_blocks=reference.set_blocks,
    score=reference.score,
)
