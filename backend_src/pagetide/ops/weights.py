"""What a matrix of a checkpoint is made of: dense values, or codes with scales and minima."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch

_QUANTIZED_TOGETHER = 2**22  # elements, so that what is computed on the way takes no memory to speak of
GROUPS = (32, 16)  # inputs that share a scale, in the order in which they are preferred


@dataclass(frozen=True)
class DenseWeight:
    """A matrix [out, in] as it is multiplied."""

    values: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        outputs, inputs = self.values.shape
        return outputs, inputs

    def dense(self) -> torch.Tensor:
        return self.values


@dataclass(frozen=True)
class QuantizedWeight:
    """A matrix [out, in] whose element is code * scale + minimum, with a scale and a minimum for each group
    of neighbouring inputs: what all integer formats come to.

    codes: uint8 [out, in], below 2 ** bits; scales, minima: float32 [out, in / group], of values that
    bfloat16 has. 8 bits are symmetric: the minimum is -128 scales. dtype: of the matrix that it stands for.
    activation_bits: to which what it multiplies may be rounded, 8 or 16, if that is faster.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    minima: torch.Tensor
    bits: int
    dtype: torch.dtype
    activation_bits: int = 16

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        outputs, inputs = self.codes.shape
        return outputs, inputs

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.shape[1] // self.scales.shape[1]

    def dense(self) -> torch.Tensor:
        """The values, rounded to the type."""
        codes = self.codes.unflatten(1, (-1, self.group)).float()
        return (codes * self.scales[..., None] + self.minima[..., None]).flatten(1).to(self.dtype)


# Every format of a checkpoint's matrices; a device's operations take those that it can multiply, and the
# dense form of others.
Weight: TypeAlias = DenseWeight | QuantizedWeight


def stacked(weights: Sequence[Weight]) -> Weight:
    """One matrix with the outputs of all, for products that share their input: dense if one of them is, and
    codes of 8 bits where their codes differ.
    """
    if any(isinstance(weight, DenseWeight) for weight in weights):
        return DenseWeight(torch.cat([weight.dense() for weight in weights]))
    quantized = [weight for weight in weights if isinstance(weight, QuantizedWeight)]
    if len({(weight.bits, weight.group) for weight in quantized}) > 1:
        quantized = [quantize(weight.dense(), 8) for weight in quantized]
    first = quantized[0]

    def joined(name: str) -> torch.Tensor:
        return torch.cat([getattr(weight, name) for weight in quantized])

    return replace(first, codes=joined("codes"), scales=joined("scales"), minima=joined("minima"))


def rearranged(weight: Weight, order: Callable[[torch.Tensor], torch.Tensor]) -> Weight:
    """The same rows in another order, or fewer of them: order takes and returns [out, ...]."""
    if isinstance(weight, DenseWeight):
        return DenseWeight(order(weight.values))
    return replace(
        weight, codes=order(weight.codes), scales=order(weight.scales), minima=order(weight.minima)
    )


def columns_of(weight: Weight, part: range) -> Weight:
    """Some inputs, in memory of their own. Raises ValueError where the edges of the part cut a group of codes
    that cannot be made smaller.
    """
    if isinstance(weight, DenseWeight):
        return DenseWeight(weight.values[:, part.start : part.stop].contiguous())
    group = math.gcd(weight.group, part.start, part.stop)
    if group < GROUPS[-1]:
        raise ValueError(f"inputs {part.start} to {part.stop} are no whole groups of {GROUPS[-1]}")

    def of_groups(values: torch.Tensor) -> torch.Tensor:
        smaller = values.repeat_interleave(weight.group // group, 1)
        return smaller[:, part.start // group : part.stop // group].contiguous()

    return replace(
        weight,
        codes=weight.codes[:, part.start : part.stop].contiguous(),
        scales=of_groups(weight.scales),
        minima=of_groups(weight.minima),
    )


def quantize(values: torch.Tensor, bits: int) -> QuantizedWeight:
    """The nearest codes of a matrix [out, in]: with 8 bits symmetric, with 4 bits from the smallest to the
    largest element, or to a little less where that makes the squared error smaller.

    Raises ValueError where no group divides the inputs.
    """
    size = values.shape[1]
    group = next((group for group in GROUPS if size % group == 0), None)
    if group is None:
        raise ValueError(f"a matrix with {size} inputs has no groups of {GROUPS[-1]}")
    nearest = _nearest_8 if bits == 8 else _nearest_4
    parts = [
        nearest(rows.float().unflatten(1, (-1, group)))
        for rows in values.split(max(1, _QUANTIZED_TOGETHER // size))
    ]
    codes, scales, minima = (torch.cat(part) for part in zip(*parts, strict=True))
    return QuantizedWeight(codes.flatten(1), scales, minima, bits, values.dtype)


def _nearest_8(grouped: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales and minima of [out, groups, group]."""
    scales = _rounded(grouped.abs().amax(2) / 127)
    return _codes(grouped, scales, -128 * scales, 8).clamp_(1), scales, -128 * scales


def _nearest_4(grouped: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same."""
    low, high = grouped.amin(2), grouped.amax(2)
    best: tuple[torch.Tensor, ...] | None = None
    for part in (1.0, 0.95, 0.9, 0.85, 0.8):
        minima = _rounded(low * part)
        scales = _rounded((high * part - minima) / 15)
        codes = _codes(grouped, scales, minima, 4)
        error = (codes * scales[..., None] + minima[..., None] - grouped).square_().sum(2)
        found: tuple[torch.Tensor, ...] = (error, codes, scales, minima)
        if best is not None:
            is_better = error < best[0]
            found = tuple(
                torch.where(is_better[..., None] if new.dim() == 3 else is_better, new, old)
                for new, old in zip(found, best, strict=True)
            )
        best = found
    assert best is not None
    _, codes, scales, minima = best
    return codes, scales, minima


def _rounded(values: torch.Tensor) -> torch.Tensor:
    """As they are kept."""
    return values.bfloat16().float()


def _codes(grouped: torch.Tensor, scales: torch.Tensor, minima: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [out, groups, group]; those of a group of equal elements are 0."""
    steps = torch.where(scales > 0, scales, 1)[..., None]
    codes = ((grouped - minima[..., None]) / steps).round_().clamp_(0, 2**bits - 1)
    return torch.where(scales[..., None] > 0, codes, 128 if bits == 8 else 0).to(torch.uint8)
