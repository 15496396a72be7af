"""What kernels' grids depend on."""

from __future__ import annotations

import torch


def num_processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; a few where the interpreter stands in its place."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
