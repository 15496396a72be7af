"""Low-rank adapters of a decoder (LoRA, arXiv:2106.09685): several lie beside the model, and each token of a
step has one of them, or none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

MATRICES = ("qkv", "out", "gate_up", "down")  # of a layer, by their names in LayerWeights
_PARTS = {"qkv": 3, "gate_up": 2}  # matrices that have become one


@dataclass(frozen=True)
class AdapterRoom:
    """How many adapters lie beside a model, and the largest rank that they may have."""

    count: int = 0
    rank: int = 0

    def rank_of(self, matrix: str) -> int:
        """The largest of what is added to one of MATRICES."""
        return self.rank * _PARTS.get(matrix, 1)


NO_ADAPTERS = AdapterRoom()


@dataclass(frozen=True)
class LowRank:
    """What is added to a matrix [out, in]: up @ down. down [rank, in]; up [out, rank], scaled already."""

    down: torch.Tensor
    up: torch.Tensor


@dataclass(frozen=True)
class LayerAdapter:
    """What is added to the matrices of one layer; None: nothing."""

    qkv: LowRank | None
    out: LowRank | None
    gate_up: LowRank | None
    down: LowRank | None
