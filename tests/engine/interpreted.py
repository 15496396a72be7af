"""Where kernels in the Triton language run: on a GPU where there is one, in the language's interpreter
elsewhere. Imported before them, since a kernel asks when it is defined.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")


def _round_to_fp8_exactly() -> None:
    """The interpreter loses the carry of a value that is rounded up to a power of two; torch does not."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def exact(values: np.ndarray, given: Any, wanted: Any, rounding: Any) -> np.ndarray:
        if wanted != tl.float8e4nv or values.dtype.kind != "f":
            return convert(values, given, wanted, rounding)
        return torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    interpreter._convert_float = exact


if not HAS_GPU:
    _round_to_fp8_exactly()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
# The interpreter computes in NumPy, which has no bfloat16.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if HAS_GPU else [])]
