"""Gathers the decoder's input for one step on the device, from the rows."""

from __future__ import annotations

from pagetide.ops.batch import Batch
from pagetide.ops.table import Ops
from pagetide.runner.plan import StepPlan
from pagetide.runner.rows import Rows


def make_batch(plan: StepPlan, rows: Rows, block_size: int, ops: Ops) -> Batch:
    """Where every token of the step stands, and what it is."""
    sequences = tuple(rows.to_device(array) for array in (plan.rows, plan.starts, plan.counts))
    ids, positions, slots, block_table = ops.gather(rows.history, rows.block_table, *sequences, plan.num_tokens, block_size)
    return Batch(
        ids=ids,
        positions=positions,
        slot_mapping=slots,
        block_table=block_table,
        logit_index=rows.indices(plan.logit_index),
        counts=plan.counts,
        starts=plan.starts,
    )
