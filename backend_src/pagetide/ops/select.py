"""Which set of functions a device uses. Asked once, at load."""

from __future__ import annotations

import torch

from pagetide.config import Settings
from pagetide.ops.plain import REFERENCE
from pagetide.ops.table import Ops


def select_ops(device: torch.device, settings: Settings) -> Ops:
    """The fastest set that this device has; the reference set if the settings say so."""
    if device.type == "cpu" and settings.ops == "auto":
        from pagetide.ops.cpu.table import make_cpu_ops  # imports Numba, which a GPU does not need

        return make_cpu_ops()
    return REFERENCE
