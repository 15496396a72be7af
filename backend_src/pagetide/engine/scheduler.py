"""Decides which tokens run in the next step. Knows sequences and blocks, never tensors.

There are no phases: a sequence wants num_wanted tokens in the cache and has num_computed; the difference is
its claim on the step. Prefill, a chunk of it, decode, what a prefix hit leaves, and re-computation after
preemption are all that one subtraction.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import numpy as np

from pagetide.config import Settings
from pagetide.engine.adapters import AdapterPlaces, AdapterSource, NoAdapters
from pagetide.engine.admissions import Claims, admittance, num_promised_rows, num_rows_for
from pagetide.engine.blocks import BlockManager
from pagetide.engine.drafts import Speculation, Speculator
from pagetide.engine.fairness import QueueTime, Turns
from pagetide.engine.groups import ModelLimits
from pagetide.engine.guides import GuideCompiler
from pagetide.engine.journal import Journal, writers_of
from pagetide.engine.outputs import OutputQueue, SampledToken, keep_report, no_token_left, sampled_tokens
from pagetide.engine.plan_builder import PlanBuilder, StepSequences
from pagetide.engine.queues import Queues
from pagetide.engine.requests import Requests
from pagetide.engine.sequence import Answer, Search, Sequence, SequenceGroup, Status
from pagetide.engine.statistics import Counters, Observations
from pagetide.runner.plan import NO_TOKEN, StepPlan, StepTokens
from pagetide.types import Request, RequestError

# Waiting requests that lack rows, or a place for their adapter, which a step looks past: the queue may hold
# thousands.
_MOST_PASSED, _MOST_UNPLACED = 64, 1024


class Scheduler:
    """The sequences of an engine: schedule() makes the next step, commit() takes its tokens.

    guides: compiles what guided requests ask for. now: the clock of deadlines and timings, in ns. adapters:
    that requests may name. speculation: None: no tokens are guessed.
    """

    def __init__(
        self,
        settings: Settings,
        limits: ModelLimits,
        blocks: BlockManager,
        guides: GuideCompiler,
        now: Callable[[], int] = time.monotonic_ns,
        adapters: AdapterSource | None = None,
        speculation: Speculation | None = None,
    ):
        self._settings = settings
        self._speculation = speculation
        self._now = now
        self.blocks = blocks
        self.queues = Queues(settings.max_num_seqs, blocks)
        self.waiting, self.running = self.queues.waiting, self.queues.running
        self.counters = Counters()
        self.observed = Observations()
        self._journal = Journal(writers_of(settings), now)
        self.turns, self.queue_time = Turns(), QueueTime(settings.max_queue_s)
        self.requests = Requests(
            settings.max_queued_requests,
            limits,
            guides,
            self.counters,
            self.observed,
            self._journal,
            self.queues.leave,
            now,
            self.turns,
            self.queue_time.limit_ns,
            adapters or NoAdapters(),
        )
        self._places = AdapterPlaces(settings.max_loras)
        self.outputs = OutputQueue(self.observed)
        self._in_flight: dict[int, StepSequences] = {}  # by step
        self._batch_is_open = True

    @property
    def guesses(self) -> bool:
        """True if tokens are guessed: then all of a step must be known before the next is planned."""
        return self._speculation is not None

    # -- requests come and go ----------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running or self.outputs or self.requests.has_news)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for their turn, or for their grammar or adapter."""
        return len(self.waiting) + self.requests.num_preparing

    def add(self, request: Request) -> None:
        """Queues a request that has been checked. Raises QueueFullError, RequestError, EngineError."""
        self.queue_time.check(self.waiting, request.priority, self.turns.next_turn(request))
        if (group := self.requests.add(request)) is not None:
            self._enqueue(group)

    def _enqueue(self, group: SequenceGroup) -> None:
        group.queued_ns = self._now()
        if self._speculation is not None and group.may_be_guessed:
            sequences, num_prompt = group.unfinished, len(group.request.prompt_ids)
            speculators = self._speculation.speculators(len(sequences), num_prompt)
            for sequence, speculator in zip(sequences, speculators, strict=True):
                sequence.speculator = speculator
        self.queues.enqueue(group.unfinished[0])

    def cancel(self, numbers: Iterable[int]) -> None:
        """Ends the requests with these numbers; unknown ones have ended already."""
        for number in numbers:
            if (group := self.requests.find(number)) is not None:
                self.counters.cancelled += 1
                self._end(group, group.unfinished, "cancelled")

    def _end_late(self) -> None:
        """Ends the requests whose deadline has passed."""
        for number in self.requests.take_late():
            if (group := self.requests.find(number)) is not None:
                self.counters.timed_out += 1
                self._end(group, group.unfinished, "timeout")
        for group in self.requests.take_overdue():
            self.requests.fail(group, self.queue_time.late())

    def _end(self, group: SequenceGroup, sequences: list[Sequence], reason: str) -> None:
        """Ends some of a request's sequences, or all of them from outside: answers get what there is."""
        ended = list(sequences)
        group.unfinished = [sequence for sequence in group.unfinished if sequence not in ended]
        for sequence in ended:
            self.queues.leave(sequence)
        self._answer(group, group.strategy.end(ended, reason))

    def _answer(self, group: SequenceGroup, answers: list[Answer]) -> None:
        self.outputs.add_answers(group, answers)
        self._journal.note(group, answers)
        if not group.unfinished:
            self.requests.forget(group)

    # -- the next step -------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan | None:
        """What runs next: running sequences first, then waiting ones, as far as budget and blocks reach.
        Nobody waits because one who wants many rows does: who fits overtakes him, and gives way as soon as he
        fits in his place.

        None: nothing can run now.
        """
        self._end_late()
        for group in self.requests.take_prepared():
            self._enqueue(group)
        step = PlanBuilder(self._settings.max_num_batched_tokens)
        step.preempted = self._may_admit() and self._give_way()
        if self._speculation is not None:
            self._guess(self._speculation, step.budget)
        for sequence in list(self.running):
            if sequence.status is Status.RUNNING and step.room_for(sequence) and sequence.can_run:
                self._continue(step, sequence)
        if not step.preempted and self._may_admit():
            self._admit_waiting(step)
            self._batch_is_open = step.budget == 0
        self.blocks.end_planning()
        if step.is_empty:
            self._resolve_deadlock()
            return None
        if self.blocks.host is not None:
            step.swap_outs, step.swap_ins = self.blocks.host.take_moves()
            self.counters.swapped_out += len(step.swap_outs)
            self.counters.swapped_in += len(step.swap_ins)
        step.adapter_load = self._places.take_load()
        plan = step.plan(self.counters.steps)
        self._in_flight[plan.step] = step.sequences()
        self.counters.steps += 1
        self.observed.step_tokens.append(plan.num_tokens)
        self.observed.step_sequences.append(len(plan.rows))
        return plan

    def _resolve_deadlock(self) -> None:
        """Beams run on only together: when some hold the blocks that others wait for, the last gives way."""
        if not self._in_flight and self.running and self.waiting:
            self._preempt(self.running[-1])

    def _may_admit(self) -> bool:
        """Static batching fills a batch, over several steps if the budget is small.

        The next is opened when all of it has ended.
        """
        return self._settings.batching == "continuous" or self._batch_is_open or not self.running

    def _give_way(self) -> bool:
        """Preempts those who have overtaken the first in line, the last of them first, where he fits in their
        place. True if any had to.
        """
        first = next((sequence for sequence in self.waiting if sequence.can_run), None)
        if first is None or (num_rows := num_rows_for(first)) == 1:
            return False
        number, running = first.request.number, self.running
        overtakers = [sequence for sequence in running if number in sequence.group.overtook]
        others = [sequence for sequence in running if number not in sequence.group.overtook]

        def fits(left: list[Sequence]) -> bool:
            """Beside those who are left."""
            num_free = self.queues.num_free_rows + len(running) - len(left)
            if num_rows + num_promised_rows(left) > num_free:
                return False
            places = {sequence.group.adapter_place for sequence in left}
            return first.group.adapter is None or self._places.has_room(first.group.adapter, places)

        if not overtakers or fits(running) or not fits(others):
            return False
        while not fits(running):
            self._preempt(overtakers.pop())
        return True

    def _continue(self, step: PlanBuilder, sequence: Sequence) -> None:
        """Gives a running sequence its share of the step, if need be by preempting the last in order."""
        speculator = sequence.speculator
        if speculator is not None and speculator.guesses and self._run_ahead(step, sequence, speculator):
            return
        count = min(sequence.num_wanted - sequence.num_computed, step.room_for(sequence))
        while (copies := self.blocks.grow(sequence, sequence.num_computed + count)) is None:
            victim = self.running[-1]
            self._preempt(victim)
            step.preempted = True
            if victim is sequence:
                return
        self._run(step, sequence, count, copies)

    def _guess(self, speculation: Speculation, budget: int) -> None:
        """Lets the running sequences guess what comes behind their next tokens, if that pays."""
        num_running, guessing = len(self.running), []
        for sequence in self.running:
            speculator, num_tokens = sequence.speculator, len(sequence.token_ids)
            decodes = num_tokens > sequence.num_prompt and num_tokens - sequence.num_computed == 1
            if speculator is None or not decodes:
                continue
            speculator.guess(
                sequence.token_ids,
                min(
                    speculation.worthwhile(num_running, speculator.rate),
                    speculation.room(budget, num_running),
                    sequence.max_len - num_tokens - 1,
                ),
            )
            if speculator.guesses:
                guessing.append(speculator)
        if guessing and not speculation.pays(num_running, guessing):
            for speculator in guessing:
                speculator.guesses = []

    def _run_ahead(self, step: PlanBuilder, sequence: Sequence, speculator: Speculator) -> bool:
        """Runs a sequence's next token and its guesses, as far as those before it have left room, and if
        blocks are left for all others.
        """
        num_tokens, blocks = len(sequence.token_ids), self.blocks
        speculator.guesses = speculator.guesses[: step.room_for(sequence) - 1]
        num_guesses = len(speculator.guesses)
        num_new = blocks.num_blocks_for(num_tokens + num_guesses) - len(sequence.blocks)
        has_blocks = num_new <= 0 or num_new + len(self.running) <= blocks.num_free
        copies = blocks.grow(sequence, num_tokens + num_guesses) if num_guesses and has_blocks else None
        if copies is None:
            speculator.guesses = []
            return False
        sequence.group.num_drafted += num_guesses
        self.counters.drafted_tokens += num_guesses
        self._run(step, sequence, 1 + num_guesses, copies)
        return True

    def _admit_waiting(self, step: PlanBuilder) -> None:
        at, num_promised = 0, num_promised_rows(self.running)
        lacking: frozenset[int] = frozenset()  # numbers of those before it who lack rows
        num_unplaced, claims = 0, Claims(self._places, self.running)  # those whose adapter has no place
        while (
            at < len(self.waiting)
            and len(lacking) < _MOST_PASSED
            and num_unplaced < _MOST_UNPLACED
            and (num_rows := self.queues.num_free_rows - num_promised) > 0
        ):
            sequence = self.waiting[at]
            if not sequence.can_run:
                # A preempted beam: its next token is chosen when the others of its search have theirs.
                at += 1
                continue
            has_place = claims.give(sequence.group)  # also to who lacks rows: nobody behind takes it
            if num_rows < num_rows_for(sequence):
                lacking |= {sequence.request.number}
                at += 1
                continue
            if not has_place:
                num_unplaced += 1
                at += 1
                continue
            if not self._admit(step, sequence):
                return  # who lacks blocks stops those behind: these would only take them
            del self.waiting[at]
            sequence.group.overtook = lacking
            if sequence.followers or sequence.group.is_beam_search:
                num_promised = num_promised_rows(self.running)

    def _admit(self, step: PlanBuilder, sequence: Sequence) -> bool:
        """Starts a waiting sequence if budget and blocks suffice; False if it has to wait on."""
        # Who was preempted in the last step has its last token by now: nothing is admitted in the step of a
        # preemption.
        assert not sequence.num_pending, sequence.num_pending
        room = step.room_for(sequence)
        if not room:
            return False
        fits = admittance(sequence, self.blocks, self._settings, room, len(self.running))
        if fits is None:
            return False
        self.blocks.adopt(sequence, fits.found)
        copies = self.blocks.grow(sequence, fits.num_reserved)
        assert copies == [], copies
        self.queues.start(sequence)
        self._note_admission(sequence)
        self._run(step, sequence, fits.num_tokens, copies)
        return True

    def _note_admission(self, sequence: Sequence) -> None:
        """A request's first admission tells how long it has waited, and what the cache had of it."""
        group, num_prompt = sequence.group, sequence.num_prompt
        if group.has_run:
            return
        group.has_run = True
        group.first_scheduled_ns = now = self._now()
        self.turns.note_start(group.request, group.cost)
        self.queue_time.note_admission(group.queued_ns, now)
        group.num_cached = sequence.num_computed
        group.num_reused_blocks = group.num_cached // self.blocks.block_size
        group.num_new_blocks = self.blocks.num_blocks_for(num_prompt) - group.num_reused_blocks
        self.counters.prompt_tokens += num_prompt
        self.counters.cached_tokens += group.num_cached
        self.observed.queue_s.append((group.first_scheduled_ns - group.arrival_ns) / 1e9)

    def _preempt(self, sequence: Sequence) -> None:
        self.counters.preemptions += 1
        if sequence.speculator is not None:
            sequence.speculator.forget()
        self.queues.preempt(sequence)

    def _run(self, step: PlanBuilder, sequence: Sequence, count: int, copies: list[tuple[int, int]]) -> None:
        """Schedules count tokens of a sequence that has the blocks for them."""
        step.place(sequence, copies)
        step.add_chunk(sequence, count)
        if sequence.num_computed // self.blocks.block_size > sequence.num_published:
            self.blocks.publish(sequence)
        if sequence.num_computed == sequence.num_wanted + sequence.num_guessed:
            step.add_sample(sequence)
            if not sequence.followers:
                return
            for follower in sequence.followers:
                self.blocks.fork(sequence, follower)
                follower.num_computed = sequence.num_computed
                self.queues.start(follower)
                step.place(follower, [])
                step.add_sample(follower)
            sequence.followers = []

    # -- the step's tokens -------------------------------------------------------------------------------

    def masks(self, plan: StepPlan) -> np.ndarray:
        """What the plan's guided rows may sample, now that all tokens before are known (Requests.masks)."""
        return self.requests.masks(self._in_flight[plan.step].guided)

    def commit(self, plan: StepPlan, tokens: StepTokens) -> None:
        """Takes a step's tokens in the order of its samples; sequences end here."""
        searching: dict[SequenceGroup, Search] = {}
        now = self._now()
        for sampled in sampled_tokens(plan, self._in_flight.pop(plan.step), tokens):
            sequence, group = sampled.sequence, sampled.sequence.group
            sequence.num_pending -= 1
            # The step was launched before the host knew that the sequence had ended.
            if sequence.is_finished:
                continue
            if sequence.speculator is not None and not self._verify(sequence, sampled.token):
                continue
            self._note_token(group, now)
            if group.search is not None:
                sequence.candidates = sampled.candidates
                searching[group] = group.search
                continue
            try:
                self._append(sampled)
            except BaseException as error:  # as on_behalf_of, which takes too long for each token
                self.requests.fail(group, error)
        for group, search in searching.items():
            with self.requests.on_behalf_of(group):
                self._go_on(group, search)

    def _verify(self, sequence: Sequence, token: int) -> bool:
        """Takes note of whether a token was guessed; False: it was drawn behind a wrong guess."""
        speculator = sequence.speculator
        assert speculator is not None
        if speculator.num_lost:
            speculator.num_lost -= 1
            return False
        if speculator.guesses:
            if speculator.verify(token):
                sequence.group.num_accepted += 1
                self.counters.accepted_tokens += 1
            else:
                # The cache has the guess in this token's place.
                sequence.num_computed = len(sequence.token_ids)
        return True

    def _note_token(self, group: SequenceGroup, now: int) -> None:
        group.last_token_ns = now
        if not group.first_token_ns:
            group.first_token_ns = now
            self.observed.ttft_s.append((group.first_token_ns - group.arrival_ns) / 1e9)

    def _append(self, sampled: SampledToken) -> None:
        sequence, token = sampled.sequence, sampled.token
        if token == NO_TOKEN:
            raise RequestError(no_token_left(sequence))
        sequence.token_ids.append(token)
        self.counters.generated_tokens += 1
        if sequence.group.reports_tokens:
            keep_report(sampled)
        reason = sequence.stops.push(token)
        if sequence.guide is not None and not reason:
            sequence.guide.advance(token)
        if not reason and len(sequence.token_ids) >= sequence.max_len:
            reason = "length"
        if reason:
            self.turns.note_answer(len(sequence.token_ids) - sequence.num_prompt)
            self._end(sequence.group, [sequence], reason)
            return
        if len(sequence.token_ids) // self.blocks.block_size > sequence.num_published:
            self._publish(sequence)
        if sequence.group.streams and not sequence.gets_more:
            self.outputs.add_tokens(sequence)

    def _publish(self, sequence: Sequence) -> None:
        if sequence.status is Status.RUNNING:
            self.blocks.publish(sequence)

    def _go_on(self, group: SequenceGroup, search: Search) -> None:
        """The next step of a search, once the candidates of all its sequences are there."""
        beams = group.unfinished
        if any(beam.candidates is None for beam in beams):
            return
        following = search.go_on(beams)
        self.counters.generated_tokens += len(following)
        group.unfinished = [child for _, child in following]
        self.queues.replace(beams, following)
        if following:
            return
        answers = search.end([], "stop")
        if not any(answer.sequence for answer in answers):
            raise RequestError(no_token_left(beams[0]))
        self._answer(group, answers)

    def check_integrity(self) -> None:
        """Raises AssertionError unless rows, blocks and states agree (see BlockManager.check_integrity)."""
        self.blocks.check_integrity(self.running)
        self.queues.check_integrity()
