"""What a matrix of a checkpoint is made of: dense values, or codes with scales and minima."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

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


@dataclass(frozen=True)
class Fp8Weight:
    """A matrix [out, in] whose element is value * scale.

    values: float8_e4m3fn [out, in]; scales: float32 [out, in / group], of each output or of groups of its
    inputs. dtype: of the matrix that it stands for.
    """

    values: torch.Tensor
    scales: torch.Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        outputs, inputs = self.values.shape
        return outputs, inputs

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.shape[1] // self.scales.shape[1]

    def dense(self) -> torch.Tensor:
        """The values, rounded to the type."""
        values = self.values.float().unflatten(1, (-1, self.group))
        return (values * self.scales[..., None]).flatten(1).to(self.dtype)


# Every format of a checkpoint's matrices; a device's operations take those that it can multiply, and the
# dense form of others.
Weight: TypeAlias = DenseWeight | QuantizedWeight | Fp8Weight


def dtype_of(weight: Weight) -> torch.dtype:
    """Of the matrix that it stands for."""
    return weight.values.dtype if isinstance(weight, DenseWeight) else weight.dtype


def device_of(weight: Weight) -> torch.device:
    """Where it is."""
    return next(iter(_tensors(weight).values())).device


def stacked(weights: Sequence[Weight]) -> Weight:
    """One matrix with the outputs of all, for products that share their input: codes of 8 bits where their
    codes differ, dense if their formats do.
    """
    if len({type(weight) for weight in weights}) > 1:
        return DenseWeight(torch.cat([weight.dense() for weight in weights]))
    if isinstance(weights[0], QuantizedWeight):
        formats = {(weight.bits, weight.group) for weight in weights if isinstance(weight, QuantizedWeight)}
        if len(formats) > 1:
            weights = [quantize(weight.dense(), 8) for weight in weights]
    elif isinstance(weights[0], Fp8Weight):
        smallest = math.gcd(*(weight.group for weight in weights if isinstance(weight, Fp8Weight)))
        weights = [_with_groups(weight, smallest) for weight in weights]
    parts = [_tensors(weight) for weight in weights]
    return _changed(weights[0], {name: torch.cat([part[name] for part in parts]) for name in parts[0]})


def rearranged(weight: Weight, order: Callable[[torch.Tensor], torch.Tensor]) -> Weight:
    """The same rows in another order, or fewer of them: order takes and returns [out, ...]."""
    return _changed(weight, {name: order(values) for name, values in _tensors(weight).items()})


def columns_of(weight: Weight, part: range) -> Weight:
    """Some inputs, in memory of their own. Raises ValueError where the edges of the part cut a group of codes
    that cannot be made smaller.
    """
    inputs = weight.shape[1]
    has_one_group = isinstance(weight, Fp8Weight) and weight.group == inputs
    if not isinstance(weight, DenseWeight) and not has_one_group:
        group = math.gcd(weight.group, part.start, part.stop)
        if group < GROUPS[-1]:
            raise ValueError(f"inputs {part.start} to {part.stop} are no whole groups of {GROUPS[-1]}")
        weight = _with_groups(weight, group)

    def cut(values: torch.Tensor) -> torch.Tensor:
        each = inputs // values.shape[1]
        is_of_all = has_one_group and each == inputs
        return values if is_of_all else values[:, part.start // each : part.stop // each].contiguous()

    return rearranged(weight, cut)


def _with_groups(weight: Weight, group: int) -> Weight:
    """Scales, and minima, of smaller groups of inputs."""
    if isinstance(weight, DenseWeight) or weight.group == group:
        return weight
    times = weight.group // group
    smaller = {
        name: values.repeat_interleave(times, 1)
        for name, values in _tensors(weight).items()
        if values.shape[1] * weight.group == weight.shape[1]
    }
    return _changed(weight, smaller)


def _tensors(weight: Weight) -> dict[str, torch.Tensor]:
    """Those that it is made of, by name: each [out, ...]."""
    return {name: values for name, values in vars(weight).items() if isinstance(values, torch.Tensor)}


def quantize_fp8(values: torch.Tensor) -> Fp8Weight:
    """The nearest FP8 values of a matrix [out, in], with the scale for each output that lets its largest
    element just fit.
    """
    scales = values.abs().amax(1, keepdim=True).float() / torch.finfo(torch.float8_e4m3fn).max
    parts = values.split(max(1, _QUANTIZED_TOGETHER // values.shape[1]))
    steps = torch.where(scales > 0, scales, 1).split(len(parts[0]))
    found = [(rows.float() / step).to(torch.float8_e4m3fn) for rows, step in zip(parts, steps, strict=True)]
    return Fp8Weight(torch.cat(found), scales, values.dtype)


def _changed(weight: Weight, tensors: dict[str, torch.Tensor]) -> Weight:
    """The same with others in their places."""
    changes: dict[str, Any] = dict(tensors)
    return replace(weight, **changes)


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
