"""What one row of the table of request fields says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Value = Any


@dataclass(frozen=True)
class Field:
    """One input of the ensemble.

    dtype: Triton's. kind: how the value is read, by CONVERTERS; dtype if empty. default: as documented.
    attribute: the field of SamplingParams it sets, if any. low, high: the allowed range, both included.
    off: values that count as not given. is_list: any number of values. is_prompt: not found in
    sampling_parameters or request parameters.
    is_unsupported: declared because Triton refuses unknown names; only values in `off`, and empty ones, are
    accepted.
    """

    name: str
    dtype: str
    sentence: str
    default: str = ""
    aliases: tuple[str, ...] = ()
    kind: str = ""
    is_list: bool = False
    attribute: str = ""
    low: float | None = None
    high: float | None = None
    off: tuple[Value, ...] = ()
    is_prompt: bool = False
    is_unsupported: bool = False
    num_dims: int = 1

    @property
    def dims(self) -> str:
        """As config.pbtxt has them, without the batch: `1`, or `-1` for each dimension of a list."""
        return ", ".join(["-1"] * self.num_dims) if self.is_list else "1"

    @property
    def names(self) -> tuple[str, ...]:
        """All names under which a client may give it, its own first."""
        return (self.name, *self.aliases)

    @property
    def allowed(self) -> str:
        """The range in words."""
        assert self.low is not None and self.high is not None
        low, high = (
            f"{bound:g}" if self.dtype == "FP32" else f"{bound:d}" for bound in (self.low, self.high)
        )
        return f"from {low} to {high}"

    def is_allowed(self, value: Value) -> bool:
        """True if the field has no range, or the value is within it."""
        if self.low is None or self.high is None:
            return True
        return isinstance(value, int | float) and not isinstance(value, bool) and self._is_in_range(value)

    def _is_in_range(self, value: float) -> bool:
        assert self.low is not None and self.high is not None
        low, high = self.low, self.high
        if self.dtype == "FP32":  # a tensor holds the bound as float32 has it, which may lie beyond
            low, high = min(low, float(np.float32(low))), max(high, float(np.float32(high)))
        return low <= value <= high
