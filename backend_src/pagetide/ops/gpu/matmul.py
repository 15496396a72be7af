"""Matrix products of a GPU, each by the way that is fastest for its form, sizes and number of rows."""

from __future__ import annotations

from bisect import bisect_left

import torch

from pagetide.ops.gpu.choices import Choices, Way
from pagetide.ops.gpu.dequantize import dequantize, rows_to_fp8, streamed
from pagetide.ops.gpu.device import FP8, multiplies_fp8
from pagetide.ops.gpu.few_rows import Streamed, arrivals_for, multiply_few_rows
from pagetide.ops.layers import Affine, Matmul
from pagetide.ops.weights import DenseWeight, Fp8Weight, Weight

ROWS = (16, 32, 64, 128, 256, 1024)  # a way is chosen for up to so many each; the last for more, too
_FEW = 256  # rows that stream at a time; where nothing has been measured, codes do up to there


class GpuProduct:
    """x @ weight.T + bias: [t, in] -> [t, out] of the given type. dtype: of x."""

    def __init__(
        self,
        choices: Choices,
        weight: Weight,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
        result: torch.dtype | None = None,
    ):
        self.weight, can_stream = on_device(weight)
        self._bias, self._dtype, self._result = bias, dtype, result or dtype
        self._arrivals = arrivals_for(self.weight.outputs, _FEW, self.weight.values.device)
        self._ways = [self._way(choices, rows, can_stream) for rows in ROWS]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if not len(x):  # a step in which no prompt has come to its end
            return torch.empty((0, self.weight.outputs), dtype=self._result, device=x.device)
        return self._ways[min(bisect_left(ROWS, len(x)), len(ROWS) - 1)](x)

    def _way(self, choices: Choices, rows: int, can_stream: bool) -> Way:
        """What is taken for so many rows."""
        weight = self.weight
        ways: dict[str, Way] = {"library": self.by_library}
        if can_stream:
            ways["streaming"] = self.by_streaming
        if self._can_round():
            ways["rounding"] = self.by_rounding
        is_head = self._result is not self._dtype
        streams = can_stream and weight.scales is not None and (rows <= _FEW or is_head)
        unmeasured = "streaming" if streams else "library"
        if is_head and rows > _FEW:
            # Of a head, which seldom sees so many; written out it would take a gigabyte.
            return ways[unmeasured]
        types = " ".join(map(str, (self._dtype, weight.values.dtype, self._result))).replace("torch.", "")
        size = f"{weight.outputs} x {weight.inputs}{' packed' if weight.is_packed else ''}"
        key = f"{rows} rows, {size} in {weight.groups} groups, {types}"
        return choices.fastest(key, ways, unmeasured, lambda: self._any_rows(rows))

    def _any_rows(self, rows: int) -> torch.Tensor:
        return torch.randn(rows, self.weight.inputs, dtype=self._dtype, device=self.weight.values.device)

    def _can_round(self) -> bool:
        """Whether the library multiplies FP8 by FP8, a scale for each row and output."""
        weight = self.weight
        is_whole = weight.outputs % 16 == 0 and weight.inputs % 16 == 0 and weight.groups == 1
        return weight.values.dtype is FP8 and is_whole and self._dtype is self._result is torch.bfloat16

    def by_streaming(self, x: torch.Tensor) -> torch.Tensor:
        parts = [
            multiply_few_rows(part, self.weight, self._bias, self._arrivals, self._result)
            for part in x.split(_FEW)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def by_library(self, x: torch.Tensor) -> torch.Tensor:
        """As it is, or written out for this product."""
        values = dequantize(self.weight, self._dtype)
        if self._result is self._dtype or x.device.type == "cpu":
            return torch.nn.functional.linear(x, values, self._bias).to(self._result)
        product = torch.mm(x, values.T, out_dtype=self._result)
        return product if self._bias is None else product.add_(self._bias)

    def by_rounding(self, x: torch.Tensor) -> torch.Tensor:
        assert self.weight.scales is not None
        values, scales = rows_to_fp8(x)
        return torch._scaled_mm(
            values,
            self.weight.values.T,
            scale_a=scales,
            scale_b=self.weight.scales.T,
            bias=self._bias,
            out_dtype=self._result,
        )


def on_device(weight: Weight) -> tuple[Streamed, bool]:
    """A matrix as the kernels read it, and whether they can multiply it: where its sizes, or the device, do
    not allow it, it becomes dense.
    """
    if isinstance(weight, Fp8Weight) and not multiplies_fp8(weight.values.device):
        weight = DenseWeight(weight.dense())
    try:
        return streamed(weight), True
    except ValueError:
        return Streamed(weight.dense().contiguous(), None, None, weight.shape[1]), False


def make_matmul(choices: Choices, dtype: torch.dtype, affine: Affine) -> Matmul:
    """LayerOps.make_matmul of a GPU."""
    return GpuProduct(choices, affine.weight, affine.bias, dtype)
