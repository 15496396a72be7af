"""Gathers the decoder's input for one step on the device, from the rows."""

from __future__ import annotations

import numpy as np

from pagetide.ops.batch import Batch
from pagetide.runner.plan import StepPlan
from pagetide.runner.rows import Rows


def make_batch(plan: StepPlan, rows: Rows, block_size: int) -> Batch:
    """Where every token of the step stands, and what it is."""
    # The first token of sequence i stands at sum(counts[:i]) in the step and at starts[i] in its sequence.
    first = np.cumsum(plan.counts) - plan.counts
    positions_host = np.arange(plan.num_tokens) - np.repeat(first - plan.starts, plan.counts)
    positions = rows.to_device(positions_host)
    token_rows = rows.to_device(np.repeat(plan.rows, plan.counts)).long()
    blocks = rows.block_table[token_rows, positions // block_size].long()
    return Batch(
        ids=rows.history[token_rows, positions],
        positions=positions,
        slot_mapping=blocks * block_size + positions % block_size,
        block_table=rows.block_table[rows.to_device(plan.rows).long()],
        logit_index=rows.to_device(plan.logit_index).long(),
        counts=plan.counts,
        starts=plan.starts,
    )
