"""Decides which tokens run in the next step. Knows sequences and blocks, never tensors.

There are no phases: a sequence wants num_wanted tokens in the cache and has num_computed; the difference is its claim on the step.
Prefill, a chunk of it, decode, what a prefix hit leaves, and re-computation after preemption are all that one subtraction.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from pagetide.config import Settings
from pagetide.engine.blocks import BlockManager
from pagetide.engine.sequence import Sequence, Status
from pagetide.engine.strategies import ModelLimits, end_ids_of, sequences_of
from pagetide.runner.plan import Admission, RowParams, StepPlan, StepTokens
from pagetide.types import Output, QueueFullError, Request


@dataclass
class _Draft:
    """A StepPlan while it is being put together. chunks: (sequence, start, count)."""

    budget: int
    chunks: list[tuple[Sequence, int, int]] = field(default_factory=list)
    samples: list[tuple[Sequence, int]] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)
    blocks: list[tuple[int, int, int]] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    num_tokens: int = 0
    preempted: bool = False


@dataclass
class Counters:
    """What has happened since the start, for statistics."""

    steps: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    cancelled: int = 0


class Scheduler:
    """The requests of an engine: schedule() makes the next step, commit() takes its tokens."""

    def __init__(self, settings: Settings, limits: ModelLimits, blocks: BlockManager):
        self._settings = settings
        self._limits = limits
        self.blocks = blocks
        self.counters = Counters()
        self.waiting: list[Sequence] = []  # sorted by arrival
        self.running: list[Sequence] = []  # sorted by arrival
        self._rows = list(range(settings.max_num_seqs - 1, -1, -1))
        self._row_params: dict[Sequence, RowParams] = {}
        self._requests: dict[int, list[Sequence]] = {}  # request number -> its unfinished sequences
        self._in_flight: dict[int, list[Sequence]] = {}  # step -> its sampled sequences
        self._outputs: list[Output] = []
        self._arrivals = 0
        self._batch_is_open = True

    # -- requests come and go ----------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running or self._outputs)

    @property
    def num_requests(self) -> int:
        return len(self._requests)

    def add(self, request: Request) -> None:
        """Queues a request that has been checked. Raises QueueFullError."""
        if len(self._requests) >= self._settings.max_queued_requests:
            limit = self._settings.max_queued_requests
            raise QueueFullError(f"Exceeds maximum queue size: Maximum queue size of {limit} requests reached")
        leader = sequences_of(request, self._limits, self._arrivals)
        samples = [leader, *leader.followers]
        for sample in samples:
            sample.arrival = self._arrivals
            self._arrivals += 1
            self._row_params[sample] = self._params_of(sample)
        self._requests[request.number] = samples
        self._enqueue(leader)

    def cancel(self, numbers: Iterable[int]) -> None:
        """Ends the requests with these numbers; unknown ones have ended already."""
        for number in numbers:
            samples = list(self._requests.get(number, ()))
            self.counters.cancelled += bool(samples)
            for sequence in samples:
                self._finish(sequence, "cancelled")

    def numbers_of(self, request_id: str) -> list[int]:
        """The numbers of the unfinished requests that their client calls request_id."""
        return [number for number, samples in self._requests.items() if samples[0].request.request_id == request_id]

    def _params_of(self, sequence: Sequence) -> RowParams:
        params = sequence.request.params
        return RowParams(
            temperature=params.temperature,
            top_k=max(params.top_k, 0),
            top_p=params.top_p,
            min_p=params.min_p,
            seed=sequence.seed,
            min_position=sequence.num_prompt + params.min_tokens if params.min_tokens else 0,
            end_ids=tuple(sorted(end_ids_of(sequence.request, self._limits))),
        )

    # -- the next step -----------------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan | None:
        """What runs next: running sequences first, then waiting ones, as far as budget and blocks reach. None: nothing can run now."""
        draft = _Draft(self._settings.max_num_batched_tokens)
        for sequence in list(self.running):
            if sequence.status is Status.RUNNING and draft.budget and not sequence.is_at_limit:
                self._continue(draft, sequence)
        if not draft.preempted and self._may_admit():
            self._admit_waiting(draft)
            self._batch_is_open = draft.budget == 0
        return self._finish_plan(draft) if draft.chunks else None

    def _may_admit(self) -> bool:
        """Static batching fills a batch, over several steps if the budget is small, and opens the next when all of it has ended."""
        return self._settings.batching == "continuous" or self._batch_is_open or not self.running

    def _continue(self, draft: _Draft, sequence: Sequence) -> None:
        """Gives a running sequence its share of the step; makes room by preempting the youngest if blocks are lacking."""
        count = min(sequence.num_wanted - sequence.num_computed, draft.budget)
        while (copies := self.blocks.grow(sequence, sequence.num_computed + count)) is None:
            victim = self.running[-1]
            self._preempt(victim)
            draft.preempted = True
            if victim is sequence:
                return
        self._add_chunk(draft, sequence, count, copies)

    def _admit_waiting(self, draft: _Draft) -> None:
        num_admitted = 0
        # In order of arrival: who does not fit stops those behind, so that nobody is overtaken for ever.
        while num_admitted < len(self.waiting) and self._admit(draft, self.waiting[num_admitted]):
            num_admitted += 1
        del self.waiting[:num_admitted]

    def _admit(self, draft: _Draft, sequence: Sequence) -> bool:
        """Starts a waiting sequence if budget, rows and blocks suffice; False if it has to wait on."""
        # Who was preempted in the last step has its last token by now: nothing is admitted in the step of a preemption.
        assert not sequence.num_pending, sequence.num_pending
        if not draft.budget or len(self._rows) <= len(sequence.followers):
            return False
        found = self.blocks.match_prefix(sequence)
        num_found = len(found) * self.blocks.block_size
        count = min(sequence.num_wanted - num_found, draft.budget)
        num_reserved = num_found + count if self._settings.kv_reservation == "paged" else sequence.max_len
        num_needed = self.blocks.num_blocks_for(num_reserved) - len(found) + self.blocks.num_free_among(found)
        # Each running sequence may want a block soon; without this reserve new ones would be preempted at once.
        if num_needed + len(self.running) > self.blocks.num_free:
            return False
        self.blocks.adopt(sequence, found)
        copies = self.blocks.grow(sequence, num_reserved)
        assert copies == [], copies
        self._start(draft, sequence)
        if sequence.num_cached < 0:
            sequence.num_cached = num_found
            self.counters.prompt_tokens += sequence.num_prompt
            self.counters.cached_tokens += num_found
        self._add_chunk(draft, sequence, count, copies, new_blocks=True)
        return True

    def _start(self, draft: _Draft, sequence: Sequence) -> None:
        sequence.row = self._rows.pop()
        sequence.status = Status.RUNNING
        insort(self.running, sequence, key=lambda s: s.arrival)
        draft.admitted.append(sequence)

    def _add_chunk(self, draft: _Draft, sequence: Sequence, count: int, copies: list[tuple[int, int]], new_blocks: bool = False) -> None:
        """Schedules count tokens of a sequence that has the blocks for them."""
        start, first_changed = sequence.num_computed, sequence.num_computed // self.blocks.block_size
        draft.copies.extend(copies)
        changed = range(0 if new_blocks else first_changed, len(sequence.blocks))
        draft.blocks.extend((sequence.row, index, sequence.blocks[index]) for index in changed)
        draft.chunks.append((sequence, start, count))
        draft.budget -= count
        draft.num_tokens += count
        sequence.num_computed += count
        self.blocks.publish(sequence)
        if sequence.num_computed == sequence.num_wanted:
            self._add_samples(draft, sequence)

    def _add_samples(self, draft: _Draft, sequence: Sequence) -> None:
        """The last token of the step's chunk samples the sequence's next token, and the first one of each follower."""
        followers, sequence.followers = sequence.followers, []
        for follower in followers:
            self.blocks.fork(sequence, follower)
            follower.num_computed = sequence.num_computed
            follower.num_cached = sequence.num_cached
            self._start(draft, follower)
            draft.blocks.extend((follower.row, index, block) for index, block in enumerate(follower.blocks))
        for sample in (sequence, *followers):
            sample.num_pending += 1
            draft.samples.append((sample, draft.num_tokens - 1))

    def _preempt(self, sequence: Sequence) -> None:
        """Takes a running sequence's blocks and row away; it computes everything again later, as far as the cache has forgotten it."""
        self.counters.preemptions += 1
        self._release(sequence)
        sequence.num_computed = 0
        self._enqueue(sequence)

    def _enqueue(self, sequence: Sequence) -> None:
        sequence.status = Status.WAITING
        insort(self.waiting, sequence, key=lambda s: s.arrival)

    def _finish_plan(self, draft: _Draft) -> StepPlan:
        step = self.counters.steps
        self.counters.steps += 1
        self._in_flight[step] = [sequence for sequence, _ in draft.samples]
        chunks = np.array([(s.row, start, count) for s, start, count in draft.chunks], np.int32).reshape(-1, 3)
        # num_wanted counts the token that this step samples; it stands at the position before that.
        samples = np.array([(at, s.row, s.num_wanted - 1) for s, at in draft.samples], np.int32).reshape(-1, 3)
        deltas = np.array(draft.blocks, np.int32).reshape(-1, 3)
        params = [self._row_params[sequence] for sequence, _ in draft.samples]
        return StepPlan(
            step=step,
            rows=chunks[:, 0],
            starts=chunks[:, 1],
            counts=chunks[:, 2],
            logit_index=samples[:, 0],
            sample_rows=samples[:, 1],
            sample_positions=samples[:, 2],
            admissions=tuple(Admission(s.row, np.array(s.token_ids, np.int32), self._row_params[s]) for s in draft.admitted),
            block_rows=deltas[:, 0],
            block_indices=deltas[:, 1],
            block_ids=deltas[:, 2],
            copies=np.array(draft.copies, np.int32).reshape(-1, 2),
            is_greedy=all(p.temperature == 0 for p in params),
            masks_end_ids=any(s.num_wanted - 1 < p.min_position for (s, _), p in zip(draft.samples, params, strict=True)),
        )

    # -- the step's tokens -------------------------------------------------------------------------------------------

    def commit(self, plan: StepPlan, tokens: StepTokens) -> None:
        """Takes a step's tokens in the order of its samples; sequences end here."""
        for sequence, token in zip(self._in_flight.pop(plan.step), tokens.ids.tolist(), strict=True):
            sequence.num_pending -= 1
            # The step was launched before the host knew that the sequence had ended.
            if not sequence.is_finished:
                self._append(sequence, token)

    def _append(self, sequence: Sequence, token: int) -> None:
        sequence.token_ids.append(token)
        self.counters.generated_tokens += 1
        reason = sequence.stops.push(token)
        if not reason and len(sequence.token_ids) >= sequence.max_len:
            reason = "length"
        if reason:
            self._finish(sequence, reason)
            return
        if sequence.status is Status.RUNNING:
            self.blocks.publish(sequence)
        if sequence.request.stream:
            self._emit(sequence, sequence.stops.take(is_last=False), "")

    def _finish(self, sequence: Sequence, reason: str) -> None:
        if sequence.status is Status.RUNNING:
            self.blocks.publish(sequence)
            self._release(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        sequence.status = Status.FINISHED
        del self._row_params[sequence]
        samples = self._requests[sequence.request.number]
        samples.remove(sequence)
        if not samples:
            del self._requests[sequence.request.number]
        self._emit(sequence, sequence.stops.take(is_last=True), reason)

    def _release(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.blocks.free(sequence)
        self._rows.append(sequence.row)
        sequence.row = -1

    def _emit(self, sequence: Sequence, ids: list[int], reason: str) -> None:
        if ids or reason:
            num_cut = sequence.stops.num_cut if reason else 0
            cached = max(sequence.num_cached, 0)
            self._outputs.append(Output(sequence.request.number, sequence.index, ids, num_cut, reason, sequence.num_prompt, cached))

    def take_outputs(self) -> list[Output]:
        """The outputs since the last call."""
        outputs, self._outputs = self._outputs, []
        return outputs

    def check_integrity(self) -> None:
        """Raises AssertionError unless rows, blocks and states agree (see BlockManager.check_integrity)."""
        self.blocks.check_integrity(self.running)
        rows = [sequence.row for sequence in self.running]
        assert sorted(rows + self._rows) == list(range(self._settings.max_num_seqs)), (rows, self._rows)
        assert all(s.status is Status.RUNNING for s in self.running)
        assert all(s.status is Status.WAITING and not s.blocks for s in self.waiting)
