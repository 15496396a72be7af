"""The arrays of a plan on its device, brought there in one copy."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch

from pagetide.ops.batch import to_device
from pagetide.runner.plan import StepPlan


@dataclass(frozen=True)
class PlanTensors:
    """The arrays of a StepPlan by their names there, int32 on the device."""

    rows: torch.Tensor
    counts: torch.Tensor
    logit_index: torch.Tensor
    sample_rows: torch.Tensor
    sample_positions: torch.Tensor
    block_rows: torch.Tensor
    block_index: torch.Tensor
    block_ids: torch.Tensor
    swap_outs: torch.Tensor
    swap_ins: torch.Tensor
    copies: torch.Tensor
    guided_rows: torch.Tensor
    score_index: torch.Tensor
    beam_index: torch.Tensor
    return_index: torch.Tensor


_NAMES = [field.name for field in fields(PlanTensors)]


def upload(plan: StepPlan, device: torch.device) -> PlanTensors:
    """Queues the copy; the plan's arrays may be forgotten."""
    arrays = [getattr(plan, name) for name in _NAMES]
    if device.type == "cpu":
        return PlanTensors(*(to_device(array, device) for array in arrays))
    joined = to_device(np.concatenate([array.ravel() for array in arrays]), device)
    parts = joined.split([array.size for array in arrays])
    return PlanTensors(*(part.view(array.shape) for part, array in zip(parts, arrays, strict=True)))
