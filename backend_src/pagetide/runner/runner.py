"""Runs plans on one device: forward() and sample() queue work and return at once, wait() brings a step's
tokens to the host.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from pagetide.kv_cache.store import KVStore
from pagetide.models.decoder import Decoder
from pagetide.ops.batch import Batch
from pagetide.ops.comm import ALONE, Comm
from pagetide.ops.table import Ops
from pagetide.runner.batch import make_batch
from pagetide.runner.device import Device
from pagetide.runner.graphs import DecodeGraphs
from pagetide.runner.plan import Admission, RowParams, StepPlan, StepTokens
from pagetide.runner.plan_tensors import PlanTensors, upload
from pagetide.runner.rows import Rows
from pagetide.runner.sampler import Sampler, read_results


class Runner:
    """The model, its KV cache and the rows of one device."""

    def __init__(
        self,
        device: Device,
        decoder: Decoder,
        store: KVStore,
        ops: Ops,
        rows: Rows,
        block_size: int,
        comm: Comm = ALONE,
    ):
        self.device = device
        self.decoder = decoder
        self._store = store
        self._block_size = block_size
        self._rows = rows
        self._ops = ops
        self._sampler = Sampler(self._rows, ops, comm)
        self._tensors: PlanTensors | None = None
        self._logits: torch.Tensor | None = None
        self._ids: torch.Tensor | None = None
        self._graphs: DecodeGraphs | None = None
        self._results: dict[int, Callable[[], list[np.ndarray]]] = {}

    def forward(self, plan: StepPlan) -> None:
        self.device.queue(self._forward, plan)

    def sample(self, plan: StepPlan, masks: np.ndarray | None = None) -> None:
        self._results[plan.step] = self.device.fetch(self._sample, plan, masks)

    def wait(self, plan: StepPlan) -> StepTokens:
        return read_results(plan, self.finish(plan))

    def finish(self, plan: StepPlan) -> list[np.ndarray]:
        """As wait(), with the tensors as the sampler gave them."""
        return self._results.pop(plan.step)()

    @torch.inference_mode()
    def record_decode(self, max_size: int) -> None:
        """Steps of up to max_size single tokens are recorded now, and replayed from here on."""
        if self._ops.can_record:
            self._graphs = DecodeGraphs(
                self.device,
                self._ops,
                self._rows,
                self._block_size,
                self._decode,
                self._sampler.draw,
                max_size,
                self.decoder.has_adapters,
            )

    def _decode(self, batch: Batch) -> torch.Tensor:
        return self.decoder.forward(batch, self._store.pool)

    @torch.inference_mode()
    def _forward(self, plan: StepPlan) -> None:
        if (load := plan.adapter_load) is not None:
            self.decoder.set_adapter(load.place, load.tensors)
        self._rows.admit(plan)
        graphs = self._graphs if self._graphs is not None and self._graphs.fits(plan) else None
        if graphs is None or plan.moves_blocks or not plan.only_samples:
            self._tensors = upload(plan, self.device.torch_device)
        if plan.moves_blocks:
            assert self._tensors is not None
            self._move_blocks(plan, self._tensors)
        if graphs is None:
            assert self._tensors is not None
            self._logits = self._forward_batch(plan, self._tensors)
        elif plan.only_samples:
            self._ids = graphs.run(plan, samples=True)
        else:
            self._logits = graphs.run(plan, samples=False)

    def _move_blocks(self, plan: StepPlan, tensors: PlanTensors) -> None:
        pool, host_pool, copy = self._store.pool, self._store.host_pool, self._ops.copy_blocks
        if len(plan.swap_outs):
            copy(pool, host_pool, tensors.swap_outs)
        if len(plan.swap_ins):
            copy(host_pool, pool, tensors.swap_ins)
        if len(plan.copies):
            copy(pool, pool, tensors.copies)

    def _forward_batch(self, plan: StepPlan, tensors: PlanTensors) -> torch.Tensor:
        if len(plan.block_rows):
            self._ops.set_blocks(
                self._rows.block_table, tensors.block_rows, tensors.block_index, tensors.block_ids
            )
        return self._decode(make_batch(plan, tensors, self._rows, self._block_size, self._ops))

    @torch.inference_mode()
    def _sample(self, plan: StepPlan, masks: np.ndarray | None) -> list[torch.Tensor]:
        ids, logits, tensors = self._ids, self._logits, self._tensors
        self._ids = self._logits = self._tensors = None
        if ids is not None:
            return [ids]
        assert logits is not None and tensors is not None
        return self._sampler(plan, tensors, logits, masks)

    def warm_up(self, num_tokens: int) -> None:
        """Runs a prompt chunk of num_tokens, and decode with all that changes logits, so that no request
        waits for compilers.

        Writes to block 0 only.
        """
        for count, start, temperature in ((num_tokens, 0, 0.0), (1, num_tokens, 0.0), (1, num_tokens, 1.0)):
            self._try(self._warm_up_plan(1, count, start, temperature))

    def try_largest(self, num_tokens: int, num_sequences: int, num_guesses: int) -> None:
        """As warm_up(), and all sequences sample at once, behind so many guesses each: what takes the most
        memory, where nobody asks for the log-probabilities of a prompt.
        """
        self.warm_up(num_tokens)
        plan = self._warm_up_plan(num_sequences, 1 + num_guesses, 0, 1.0)
        order = np.arange(plan.num_tokens, dtype=np.int32)
        self._try(
            replace(
                plan,
                logit_index=order,
                sample_rows=order // (1 + num_guesses),
                sample_positions=1 + order % (1 + num_guesses),
                num_sampled=len(order),
            )
        )

    def _warm_up_plan(self, num_sequences: int, count: int, start: int, temperature: float) -> StepPlan:
        """As if rows had adapters, if they can: a step of such takes more memory."""
        plan = warm_up_plan(num_sequences, count, start, temperature, self._block_size)
        return replace(plan, has_adapters=self.decoder.has_adapters)

    def _try(self, plan: StepPlan) -> None:
        self.forward(plan)
        self.sample(plan)
        self.wait(plan)

    def close(self) -> None:
        self.device.close()
        self._graphs = None


def warm_up_plan(num_sequences: int, count: int, start: int, temperature: float, block_size: int) -> StepPlan:
    """A step of the first rows, of so many tokens each, all of whose blocks are block 0."""
    num_blocks = -(-(start + count) // block_size)
    params = RowParams(temperature=temperature, top_p=0.9)
    rows, tokens = np.arange(num_sequences, dtype=np.int32), np.zeros(start + count, np.int32)

    def each(value: int) -> np.ndarray:
        return np.full(num_sequences, value, np.int32)

    return StepPlan(
        step=-1,
        rows=rows,
        starts=each(start),
        counts=each(count),
        logit_index=(rows + 1) * count - 1,
        sample_rows=rows,
        sample_positions=each(start + count),
        num_sampled=num_sequences,
        admissions=tuple(Admission(row, start, tokens, params) for row in range(num_sequences)),
        block_rows=np.repeat(rows, num_blocks),
        block_index=np.tile(np.arange(num_blocks, dtype=np.int32), num_sequences),
        block_ids=np.zeros(num_sequences * num_blocks, np.int32),
        copies=np.empty((0, 2), np.int32),
        is_greedy=temperature == 0,
        has_penalties=temperature > 0,
        has_edits=temperature > 0,
        has_masks=temperature > 0,
    )
