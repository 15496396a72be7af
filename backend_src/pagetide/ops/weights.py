"""What a matrix of a checkpoint is made of: dense values, and where a format has them scales, zero points,
codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class DenseWeight:
    """A matrix [out, in] as it is multiplied."""

    values: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        outputs, inputs = self.values.shape
        return outputs, inputs

    @classmethod
    def stacked(cls, weights: Sequence[DenseWeight]) -> DenseWeight:
        """One matrix with the outputs of all, for products that share their input."""
        return cls(torch.cat([weight.values for weight in weights]))


# Every format of a checkpoint's matrices; a device's make_matmul takes those that it can multiply.
Weight = DenseWeight
