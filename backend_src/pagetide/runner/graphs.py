"""Decode steps as graphs: what a step of single tokens queues is recorded once for each of some batch sizes,
sampling included, and then costs one launch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from pagetide.ops.batch import Batch, staged
from pagetide.ops.table import Ops
from pagetide.runner.device import Device
from pagetide.runner.plan import StepPlan
from pagetide.runner.rows import Rows

PADDING = -1  # the row of what a batch is padded with
MAX_SIZE = (
    512  # larger steps take so long that their launches do not matter; each size costs start and memory
)


class Inputs(NamedTuple):
    """What a recorded step reads: int32 rows [size]; block table changes [size] each."""

    rows: torch.Tensor
    block_rows: torch.Tensor
    block_index: torch.Tensor
    block_ids: torch.Tensor


class Recorded(NamedTuple):
    """A recorded step: replay() queues it; inputs: int32 [4 * size]; result: int64 [size] or logits."""

    replay: Callable[[], None]
    inputs: torch.Tensor
    result: torch.Tensor


class DecodeGraphs:
    """Steps in which every sequence runs one token and samples the next.

    forward: a batch to logits; sample: logits, rows and positions to tokens. max_size: the largest batch that
    there will be; those beyond MAX_SIZE do not fit. has_adapters: rows may have some, for which all steps do
    the work.
    """

    def __init__(
        self,
        device: Device,
        ops: Ops,
        rows: Rows,
        block_size: int,
        forward: Callable[[Batch], torch.Tensor],
        sample: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
        max_size: int,
        has_adapters: bool = False,
    ):
        self._device, self._ops, self._rows, self._block_size = device, ops, rows, block_size
        self._forward, self._sample, self._has_adapters = forward, sample, has_adapters
        max_size = min(max_size, MAX_SIZE)
        self._sizes = graph_sizes(max_size)
        self._order = np.arange(max_size, dtype=np.int32)
        # A graph knows addresses: what it reads must outlive it.
        self._tokens = torch.arange(max_size, dtype=torch.int32, device=device.torch_device)
        self._counts = torch.ones_like(self._tokens)
        self._recorded: dict[tuple[int, bool], Recorded] = {}
        self._logits = torch.empty(0)
        # The largest first: the memory that it takes serves all others.
        for size in reversed(self._sizes):
            for samples in (True, False):
                self._find(size, samples)

    def fits(self, plan: StepPlan) -> bool:
        """True if run() can do the plan's forward()."""
        count = len(plan.rows)
        return (
            count <= self._sizes[-1]
            and plan.num_tokens == count == plan.num_sampled == len(plan.logit_index)
            and len(plan.block_rows) <= self._size(count)
            and np.array_equal(plan.sample_rows, plan.rows)
            and np.array_equal(plan.logit_index, self._order[:count])
        )

    def run(self, plan: StepPlan, samples: bool) -> torch.Tensor:
        """Queues the step. Returns its tokens int64 [n] if it samples, its logits float32 [n, vocabulary]
        otherwise, both good until the next step.
        """
        count = len(plan.rows)
        size = self._size(count)
        recorded = self._find(size, samples)
        packed = staged(_pack(plan, size), self._device.torch_device)
        recorded.inputs.copy_(packed, non_blocking=True)
        recorded.replay()
        return recorded.result[:count]

    def _size(self, count: int) -> int:
        return next(size for size in self._sizes if size >= count)

    def _find(self, size: int, samples: bool) -> Recorded:
        found = self._recorded.get((size, samples))
        if found is None:
            found = self._recorded[size, samples] = self._record(size, samples)
        return found

    def _record(self, size: int, samples: bool) -> Recorded:
        device = self._device.torch_device
        inputs = torch.full((4 * size,), PADDING, dtype=torch.int32, device=device)
        inputs[2 * size :] = 0
        parts = Inputs(*inputs.split(size))
        tokens, counts = self._tokens[:size], self._counts[:size]

        def step() -> torch.Tensor:
            rows = self._rows
            self._ops.set_blocks(rows.block_table, parts.block_rows, parts.block_index, parts.block_ids)
            ids, positions, slots, block_table, lengths = self._ops.gather(
                rows.history, rows.block_table, rows.lengths, parts.rows, counts, size, self._block_size
            )
            ones, starts = np.ones(size, np.int32), np.zeros(size, np.int32)
            adapters = rows.adapters[parts.rows] if self._has_adapters else None
            batch = Batch(
                ids, positions, slots, block_table, lengths, tokens, ones, starts, self._block_size, adapters
            )
            logits = self._forward(batch)
            if samples:
                return self._sample(logits, parts.rows, lengths)
            return self._kept_logits(logits)

        replay, result = self._device.record(step)
        return Recorded(replay, inputs, result)

    def _kept_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """In memory of their own, one for all sizes: that of a graph is used again inside it."""
        if not len(self._logits):
            shape = self._sizes[-1], logits.shape[1]
            self._logits = torch.empty(shape, dtype=logits.dtype, device=logits.device)
        return self._logits[: len(logits)].copy_(logits)


def _pack(plan: StepPlan, size: int) -> np.ndarray:
    """Inputs of a recorded step, padded: int32 [4 * size]."""
    packed = np.zeros((4, size), np.int32)
    packed[:2] = PADDING
    packed[0, : len(plan.rows)] = plan.rows
    count = len(plan.block_rows)
    packed[1, :count], packed[2, :count], packed[3, :count] = (
        plan.block_rows,
        plan.block_index,
        plan.block_ids,
    )
    return packed.ravel()


def graph_sizes(max_size: int) -> list[int]:
    """Batch sizes that are recorded, up to max_size: small ones exactly, larger ones with at most an eighth
    of padding or so.
    """
    sizes = [1, 2, 4, 8, *range(16, 128, 8), *range(128, 256, 16), *range(256, max_size + 32, 32)]
    return [size for size in sizes if size < max_size] + [max_size]
