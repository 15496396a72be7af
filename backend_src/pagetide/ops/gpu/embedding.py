"""The first and the last matrix of a decoder on a GPU."""

from __future__ import annotations

import torch

from pagetide.ops.gpu.norm import add_rms_norm
from pagetide.ops.layers import EmbeddingWeights


class GpuEmbedding:
    """Embedding whose logits leave the matrix product in float32."""

    def __init__(self, weights: EmbeddingWeights):
        self._weights = weights
        self._embedding = weights.embedding.dense()
        self._head = self._embedding if weights.head is None else weights.head.dense()

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return self._embedding[ids]

    def logits(self, residual: torch.Tensor) -> torch.Tensor:
        normed = add_rms_norm(None, residual, self._weights.norm, self._weights.eps)
        if self._head.dtype is torch.float32 or normed.device.type == "cpu":
            return torch.mm(normed, self._head.T).float()
        return torch.mm(normed, self._head.T, out_dtype=torch.float32)
