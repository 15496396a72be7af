"""What kernels' grids and blocks depend on."""

from __future__ import annotations

import torch
import triton

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max


def num_processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; a few where the interpreter stands in its place."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def dim_block(head_dim: int) -> int:
    """A head's size as matrix products take it: a power of two, and at least the tensor cores' 16."""
    return max(16, triton.next_power_of_2(head_dim))


def multiplies_fp8(device: torch.device) -> bool:
    """Whether kernels take float8_e4m3fn there: from compute capability 8.9 on, and in the interpreter."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)
