"""Where kernels in the Triton language run: on a GPU where there is one, in the language's interpreter
elsewhere. Imported before them, since a kernel asks when it is defined.
"""

from __future__ import annotations

import os

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
# The interpreter computes in NumPy, which has no bfloat16.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if HAS_GPU else [])]
