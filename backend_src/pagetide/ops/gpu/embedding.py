"""The first and the last matrix of a decoder on a GPU."""

from __future__ import annotations

import torch

from pagetide.ops.gpu.choices import Choices
from pagetide.ops.gpu.dequantize import dequantize
from pagetide.ops.gpu.matmul import GpuProduct, on_device
from pagetide.ops.gpu.norm import add_rms_norm
from pagetide.ops.layers import EmbeddingWeights


class GpuEmbedding:
    """Embedding whose logits leave the matrix product in float32. dtype: of activations."""

    def __init__(self, choices: Choices, dtype: torch.dtype, weights: EmbeddingWeights):
        self._norm, self._eps, self._dtype = weights.norm, weights.eps, dtype
        head = weights.embedding if weights.head is None else weights.head
        self._head = GpuProduct(choices, head, None, dtype, torch.float32)
        self._table = self._head.weight if weights.head is None else on_device(weights.embedding)[0]

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return dequantize(self._table, self._dtype, ids)

    def logits(self, residual: torch.Tensor) -> torch.Tensor:
        return self._head(add_rms_norm(None, residual, self._norm, self._eps))
