"""State of each row on the device: its tokens, its block table, its sampling parameters. Changed by a plan's differences only."""

from __future__ import annotations

import numpy as np
import torch

from pagetide.runner.plan import Admission, RowParams, StepPlan


class Rows:
    """history int64 [max_rows, max_len]: all tokens of each row, sampled ones too, so that the next step finds its input on the device.

    block_table int32 [max_rows, max_blocks]; sampling parameters [max_rows].
    """

    def __init__(self, max_rows: int, max_len: int, block_size: int, device: torch.device):
        self._device = device
        max_blocks = -(-max_len // block_size)
        self.history = torch.zeros((max_rows, max_len + 1), dtype=torch.int64, device=device)
        self.block_table = torch.zeros((max_rows, max_blocks), dtype=torch.int32, device=device)
        self.temperature = torch.zeros(max_rows, dtype=torch.float32, device=device)
        self.top_k = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self.top_p = torch.ones(max_rows, dtype=torch.float32, device=device)
        self.min_p = torch.zeros(max_rows, dtype=torch.float32, device=device)
        self.seed = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self.params: list[RowParams | None] = [None] * max_rows  # host side

    def apply(self, plan: StepPlan) -> None:
        """Admits the plan's sequences and changes block tables."""
        for admission in plan.admissions:
            self._write_tokens(admission)
        if plan.admissions:
            self._write_params(plan.admissions)
        if len(plan.block_rows):
            rows, indices = self.to_device(plan.block_rows).long(), self.to_device(plan.block_indices).long()
            self.block_table[rows, indices] = self.to_device(plan.block_ids)

    def _write_tokens(self, admission: Admission) -> None:
        self.history[admission.row, : len(admission.token_ids)] = self.to_device(admission.token_ids).long()

    def _write_params(self, admissions: tuple[Admission, ...]) -> None:
        rows = self.to_device(np.array([a.row for a in admissions], np.int64))
        for name in ("temperature", "top_k", "top_p", "min_p", "seed"):
            state = getattr(self, name)
            state[rows] = torch.tensor([getattr(a.params, name) for a in admissions], dtype=state.dtype).to(self._device)
        for admission in admissions:
            self.params[admission.row] = admission.params

    def to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device, non_blocking=True)
