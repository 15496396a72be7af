"""What kernels' grids and blocks depend on."""

from __future__ import annotations

import torch
import triton


def num_processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; a few where the interpreter stands in its place."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def dim_block(head_dim: int) -> int:
    """A head's size as matrix products take it: a power of two, and at least the tensor cores' 16."""
    return max(16, triton.next_power_of_2(head_dim))
