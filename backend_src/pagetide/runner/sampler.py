"""Logits to tokens, for all sampled rows at once."""

from __future__ import annotations

import torch

from pagetide.ops.table import Ops
from pagetide.runner.plan import StepPlan
from pagetide.runner.rows import Rows


class Sampler:
    """Samples a plan's tokens and writes them into the rows' history, where the next step reads them."""

    def __init__(self, rows: Rows, ops: Ops):
        self._rows = rows
        self._ops = ops

    def __call__(self, plan: StepPlan, logits: torch.Tensor) -> torch.Tensor:
        """logits float32 [s, vocabulary], changed in place; returns int64 [s]."""
        rows = self._rows.to_device(plan.sample_rows).long()
        positions = self._rows.to_device(plan.sample_positions).long()
        if plan.masks_end_ids:
            self._mask_end_ids(plan, logits)
        ids = self._ops.argmax(logits) if plan.is_greedy else self._sample(rows, positions, logits)
        self._rows.history[rows, positions] = ids
        return ids

    def _sample(self, rows: torch.Tensor, positions: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        state = self._rows
        return self._ops.sample(logits, state.temperature[rows], state.top_k[rows], state.top_p[rows], state.min_p[rows], state.seed[rows], positions)

    def _mask_end_ids(self, plan: StepPlan, logits: torch.Tensor) -> None:
        pairs = [
            (at, end_id)
            for at, (row, position) in enumerate(zip(plan.sample_rows.tolist(), plan.sample_positions.tolist(), strict=True))
            if (params := self._rows.params[row]) is not None and position < params.min_position
            for end_id in params.end_ids
        ]
        if pairs:
            at, end_ids = torch.tensor(pairs, device=logits.device).unbind(1)
            logits[at, end_ids] = -torch.inf
