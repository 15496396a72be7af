"""A step's input for the decoder, gathered on the device from the rows."""

from __future__ import annotations

from pagetide.ops.batch import Batch
from pagetide.ops.table import Ops
from pagetide.runner.plan import StepPlan
from pagetide.runner.plan_tensors import PlanTensors
from pagetide.runner.rows import Rows


def make_batch(plan: StepPlan, tensors: PlanTensors, rows: Rows, block_size: int, ops: Ops) -> Batch:
    """Where every token of the step stands, and what it is.

    Afterwards the rows are as long as the step makes them.
    """
    ids, positions, slots, block_table, lengths = ops.gather(
        rows.history,
        rows.block_table,
        rows.lengths,
        tensors.rows,
        tensors.counts,
        plan.num_tokens,
        block_size,
    )
    adapters = None
    if plan.has_adapters:
        of_sequence = rows.adapters[tensors.rows]
        adapters = of_sequence.repeat_interleave(tensors.counts, output_size=plan.num_tokens)
    return Batch(
        ids=ids,
        positions=positions,
        slot_mapping=slots,
        block_table=block_table,
        lengths=lengths,
        logit_index=tensors.logit_index,
        counts=plan.counts,
        starts=plan.starts,
        block_size=block_size,
        adapters=adapters,
    )
