"""Decides which tokens run in the next step. Knows sequences and blocks, never tensors.

There are no phases: a sequence wants num_wanted tokens in the cache and has num_computed; the difference is its claim on the step.
Prefill, a chunk of it, decode, what a prefix hit leaves, and re-computation after preemption are all that one subtraction.
"""

from __future__ import annotations

import heapq
import logging
import time
from bisect import insort
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from pagetide.config import Settings
from pagetide.engine.blocks import BlockManager
from pagetide.engine.draft import Draft, Flight, samples_first
from pagetide.engine.guides import GuideCompiler, GuideState
from pagetide.engine.sequence import Sequence, SequenceGroup, Status
from pagetide.engine.statistics import Counters, Observations
from pagetide.engine.strategies import Answer, BeamSearch, ModelLimits, give_guides, group_of
from pagetide.runner.plan import NO_TOKEN, BeamCandidates, StepPlan, StepTokens, TokenScores, bits_of
from pagetide.types import EngineError, Output, QueueFullError, Request, RequestError, TokenScore

log = logging.getLogger("pagetide.scheduler")

_GUIDE_WAIT_S = 0.005


@dataclass(frozen=True)
class Refusal:
    """A request that cannot be answered, found out after it had been taken. error: RequestError if it is the client's fault."""

    number: int
    error: Exception


class Scheduler:
    """The requests of an engine: schedule() makes the next step, commit() takes its tokens.

    guides: compiles what guided requests ask for. now: the clock of deadlines and timings, in ns.
    """

    def __init__(
        self,
        settings: Settings,
        limits: ModelLimits,
        blocks: BlockManager,
        guides: GuideCompiler,
        now: Callable[[], int] = time.monotonic_ns,
    ):
        self._settings = settings
        self._limits = limits
        self._guides = guides
        self._now = now
        self.blocks = blocks
        self.counters = Counters()
        self.observed = Observations()
        self.waiting: list[Sequence] = []  # sorted by order
        self.running: list[Sequence] = []  # sorted by order
        self._compiling: dict[int, Future[Callable[[], GuideState]]] = {}  # request number -> its guide
        self._deadlines: list[tuple[int, int]] = []  # heap of (deadline, request number)
        self._rows = list(range(settings.max_num_seqs - 1, -1, -1))
        self._groups: dict[int, SequenceGroup] = {}  # request number -> group with unfinished sequences
        self._in_flight: dict[int, Flight] = {}  # by step
        self._outputs: list[Output] = []
        self._refusals: list[Refusal] = []
        self._arrivals = 0
        self._batch_is_open = True
        self._end_bits = bits_of((i for i in limits.end_ids if i < limits.vocab_size), limits.vocab_size)

    # -- requests come and go ----------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running or self._outputs or self._refusals or self._compiling)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for their turn, or for their grammar."""
        return len(self.waiting) + len(self._compiling)

    @property
    def has_room(self) -> bool:
        """True if add() does not raise QueueFullError."""
        return len(self._groups) < self._settings.max_queued_requests

    def add(self, request: Request) -> None:
        """Queues a request that has been checked. Raises QueueFullError, RequestError, EngineError."""
        if not self.has_room:
            limit = self._settings.max_queued_requests
            raise QueueFullError(f"Exceeds maximum queue size: Maximum queue size of {limit} requests reached")
        try:
            group = group_of(request, self._limits, self._arrivals, self._now())
        except RequestError:
            raise
        except Exception as error:
            raise self._internal_error(error) from error
        self._arrivals += len(group.unfinished)
        self._groups[request.number] = group
        if request.deadline_ns:
            self._note_deadline(request)
        if request.params.guide is not None:
            with self._on_behalf_of(group):
                self._compiling[request.number] = self._guides.compile(request.params.guide)
        else:
            self._enqueue(group.unfinished[0])

    def cancel(self, numbers: Iterable[int]) -> None:
        """Ends the requests with these numbers; unknown ones have ended already."""
        for number in numbers:
            self.counters.cancelled += number in self._groups
            self._end_group(number, "cancelled")

    def numbers_of(self, request_id: str) -> list[int]:
        """The numbers of the unfinished requests that their client calls request_id."""
        return [number for number, group in self._groups.items() if group.request.request_id == request_id]

    def _end_group(self, number: int, reason: str) -> None:
        """Ends a request from outside; each of its answers gets what it has."""
        group = self._groups.get(number)
        if group is None:
            return
        self._stop_compiling(number)
        if isinstance(group.strategy, BeamSearch):
            self._answer_beams(group, group.strategy, reason)
            return
        for sequence in list(group.unfinished):
            self._finish(sequence, reason)

    def _stop_compiling(self, number: int) -> None:
        if guide := self._compiling.pop(number, None):
            guide.cancel()

    def _note_deadline(self, request: Request) -> None:
        heapq.heappush(self._deadlines, (request.deadline_ns, request.number))
        if len(self._deadlines) > 2 * len(self._groups) + 64:  # most belong to requests that have ended long before
            self._deadlines = [entry for entry in self._deadlines if entry[1] in self._groups]
            heapq.heapify(self._deadlines)

    def _end_late(self) -> None:
        """Ends the requests whose deadline has passed."""
        now = self._now()
        while self._deadlines and self._deadlines[0][0] <= now:
            _, number = heapq.heappop(self._deadlines)
            self.counters.timed_out += number in self._groups
            self._end_group(number, "timeout")

    # -- what goes wrong because of one request ------------------------------------------------------------------------

    @contextmanager
    def _on_behalf_of(self, group: SequenceGroup) -> Iterator[None]:
        """Whatever is raised inside belongs to this request: it fails, and nobody else notices."""
        try:
            yield
        except RequestError as error:
            self._fail(group, error)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of a library written in Rust is no Exception
            self._fail(group, self._internal_error(error))

    def _internal_error(self, error: BaseException) -> EngineError:
        log.error("a request has failed", exc_info=error)
        return EngineError(f"the engine failed at this request ({type(error).__name__})")

    def _fail(self, group: SequenceGroup, error: Exception) -> None:
        """Ends a request with an error in place of its further answers."""
        if self._groups.pop(group.request.number, None) is None:
            return  # it has ended in another way already
        self.counters.failed += 1
        self._stop_compiling(group.request.number)
        for sequence in group.unfinished:
            self._leave(sequence)
        group.unfinished = []
        self._refusals.append(Refusal(group.request.number, error))

    # -- grammars ----------------------------------------------------------------------------------------------------

    def wait_for_guides(self) -> None:
        """A short wait, for when nothing can be done until some grammar is compiled."""
        wait(self._compiling.values(), _GUIDE_WAIT_S)

    def _take_guides(self) -> None:
        """Lets the requests whose grammars are ready join the queue; refuses those whose are none."""
        for number in [number for number, guide in self._compiling.items() if guide.done()]:
            guide, group = self._compiling.pop(number), self._groups[number]
            with self._on_behalf_of(group):
                give_guides(group, guide.result())
                self._enqueue(group.unfinished[0])

    def masks(self, plan: StepPlan) -> np.ndarray:
        """Which tokens the plan's guided rows may sample, now that all tokens before are known: int32 [g, vocabulary / 32]."""
        sequences = self._in_flight[plan.step].guided
        masks = np.full((len(sequences), -(-self._limits.vocab_size // 32)), -1, np.int32)
        for mask, sequence in zip(masks, sequences, strict=True):
            if sequence.guide is not None and not sequence.is_finished:
                with self._on_behalf_of(sequence.group):
                    sequence.guide.fill(mask)
                    self._restrict(sequence, mask)
        return masks

    def _restrict(self, sequence: Sequence, mask: np.ndarray) -> None:
        """Further rules of the request hold as far as the grammar leaves a choice."""
        rules = []
        if len(sequence.token_ids) - sequence.num_prompt < sequence.group.params.min_tokens:
            rules.append(~self._end_bits)
        if sequence.group.allowed_bits is not None:
            rules.append(sequence.group.allowed_bits)
        for rule in rules:
            if (mask & rule).any():
                mask &= rule

    # -- the next step -----------------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan | None:
        """What runs next: running sequences first, then waiting ones, as far as budget and blocks reach. None: nothing can run now."""
        self._end_late()
        self._take_guides()
        draft = Draft(self._settings.max_num_batched_tokens)
        for sequence in list(self.running):
            if sequence.status is Status.RUNNING and draft.budget and sequence.can_run:
                self._continue(draft, sequence)
        if not draft.preempted and self._may_admit():
            self._admit_waiting(draft)
            self._batch_is_open = draft.budget == 0
        self.blocks.end_planning()
        if not draft.chunks:
            self._resolve_deadlock()
            return None
        plan = draft.plan(self.counters.steps)
        self._in_flight[plan.step] = draft.flight()
        self.counters.steps += 1
        self.observed.step_tokens.append(plan.num_tokens)
        self.observed.step_sequences.append(len(plan.rows))
        return plan

    def _resolve_deadlock(self) -> None:
        """Beams run on only together: when some of them hold the blocks that others wait for, the last in order gives way."""
        if not self._in_flight and self.running and self.waiting:
            self._preempt(self.running[-1])

    def _may_admit(self) -> bool:
        """Static batching fills a batch, over several steps if the budget is small, and opens the next when all of it has ended."""
        return self._settings.batching == "continuous" or self._batch_is_open or not self.running

    def _continue(self, draft: Draft, sequence: Sequence) -> None:
        """Gives a running sequence its share of the step; makes room by preempting the last in order if blocks are lacking."""
        count = min(sequence.num_wanted - sequence.num_computed, draft.budget)
        while (copies := self.blocks.grow(sequence, sequence.num_computed + count)) is None:
            victim = self.running[-1]
            self._preempt(victim)
            draft.preempted = True
            if victim is sequence:
                return
        self._run(draft, sequence, count, copies)

    def _admit_waiting(self, draft: Draft) -> None:
        at = 0
        while at < len(self.waiting):
            if not self.waiting[at].can_run:
                at += 1  # a preempted beam whose next token is chosen when the others of its search, perhaps behind it, have theirs
            elif self._admit(draft, self.waiting[at]):
                del self.waiting[at]
            else:
                return  # who does not fit stops those behind, so that nobody is overtaken for ever

    def _admit(self, draft: Draft, sequence: Sequence) -> bool:
        """Starts a waiting sequence if budget, rows and blocks suffice; False if it has to wait on."""
        # Who was preempted in the last step has its last token by now: nothing is admitted in the step of a preemption.
        assert not sequence.num_pending, sequence.num_pending
        if not draft.budget or len(self._rows) - self._num_promised() < num_rows_for(sequence):
            return False
        found = self._find_prefix(sequence)
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
        self._start(sequence)
        self._note_admission(sequence.group, num_found)
        self._run(draft, sequence, count, copies)
        return True

    def _find_prefix(self, sequence: Sequence) -> list[int]:
        # What the model thinks of the prompt's tokens is known only by running them.
        return [] if sequence.group.looks_at_prompt else self.blocks.match_prefix(sequence)

    def _note_admission(self, group: SequenceGroup, num_found: int) -> None:
        if group.first_scheduled_ns:
            return
        group.first_scheduled_ns = self._now()
        group.num_cached = num_found
        group.num_reused_blocks = num_found // self.blocks.block_size
        group.num_new_blocks = self.blocks.num_blocks_for(len(group.request.prompt_ids)) - group.num_reused_blocks
        self.counters.prompt_tokens += len(group.request.prompt_ids)
        self.counters.cached_tokens += num_found
        self.observed.queue_s.append((group.first_scheduled_ns - group.arrival_ns) / 1e9)

    def _num_promised(self) -> int:
        """Rows that running sequences will want for their followers or further beams."""
        searches = {sequence.group for sequence in self.running if sequence.group.is_beam_search}
        further_beams = sum(group.params.beam_width - len(group.unfinished) for group in searches)
        return further_beams + sum(len(sequence.followers) for sequence in self.running)

    def _start(self, sequence: Sequence) -> None:
        sequence.row = self._rows.pop()
        sequence.status = Status.RUNNING
        sequence.is_placed = False
        insort(self.running, sequence, key=lambda s: s.order)

    def _run(self, draft: Draft, sequence: Sequence, count: int, copies: list[tuple[int, int]]) -> None:
        """Schedules count tokens of a sequence that has the blocks for them."""
        draft.copies.extend(copies)
        draft.place(sequence, sequence.num_computed // self.blocks.block_size)
        draft.add_chunk(sequence, count)
        self.blocks.publish(sequence)
        if sequence.num_computed == sequence.num_wanted:
            draft.add_sample(sequence)
            for follower in sequence.followers:
                self.blocks.fork(sequence, follower)
                follower.num_computed = sequence.num_computed
                self._start(follower)
                draft.place(follower, 0)
                draft.add_sample(follower)
            sequence.followers = []

    def _preempt(self, sequence: Sequence) -> None:
        """Takes a running sequence's blocks and row away; it computes everything again later, as far as the cache has forgotten it."""
        self.counters.preemptions += 1
        self._release(sequence)
        sequence.num_computed = 0
        self._enqueue(sequence)

    def _enqueue(self, sequence: Sequence) -> None:
        sequence.status = Status.WAITING
        insort(self.waiting, sequence, key=lambda s: s.order)

    def _release(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.blocks.free(sequence)
        self._rows.append(sequence.row)
        sequence.row = -1

    # -- the step's tokens -------------------------------------------------------------------------------------------

    def commit(self, plan: StepPlan, tokens: StepTokens) -> None:
        """Takes a step's tokens in the order of its samples; sequences end here."""
        flight = self._in_flight.pop(plan.step)
        scores = dict(zip(plan.scored.tolist(), _scores(tokens.scores), strict=True))
        logits = dict(zip(plan.kept.tolist(), () if tokens.logits is None else tokens.logits, strict=True))
        candidates = dict(zip(plan.beams.tolist(), _of_each_beam(tokens.candidates), strict=True))
        for at, sequence in enumerate(flight.looks, len(flight.samples)):
            if at in scores:
                sequence.group.prompt_scores.append(_trimmed(scores[at], sequence.group.params.prompt_logprobs or 0))
            if sequence.request.context_logits:
                sequence.group.context_logits.append(logits[at])
        searches: dict[SequenceGroup, None] = {}
        for at, (sequence, token) in enumerate(zip(flight.samples, tokens.ids.tolist(), strict=True)):
            if sequence.request.context_logits and at in logits and samples_first(sequence):
                sequence.group.context_logits.append(logits[at])
            sequence.num_pending -= 1
            # The step was launched before the host knew that the sequence had ended.
            if sequence.is_finished:
                continue
            self._note_token(sequence.group)
            if at in candidates:
                sequence.candidates = candidates[at]
                searches[sequence.group] = None
                continue
            with self._on_behalf_of(sequence.group):
                self._append(sequence, token, scores.get(at), logits.get(at))
        for group in searches:
            with self._on_behalf_of(group):
                self._go_on_with_beams(group)

    def _note_token(self, group: SequenceGroup) -> None:
        group.last_token_ns = self._now()
        if not group.first_token_ns:
            group.first_token_ns = group.last_token_ns
            self.observed.ttft_s.append((group.first_token_ns - group.arrival_ns) / 1e9)

    def _append(self, sequence: Sequence, token: int, score: TokenScore | None, logits: np.ndarray | None) -> None:
        if token == NO_TOKEN:
            raise RequestError(no_token_left(sequence))
        sequence.token_ids.append(token)
        self.counters.generated_tokens += 1
        if score is not None:
            sequence.cumulative_logprob += score.logprob
            sequence.scores.append(_trimmed(score, sequence.group.params.logprobs or 0))
        if sequence.request.generation_logits and logits is not None:
            sequence.logits.append(logits)
        reason = sequence.stops.push(token)
        if sequence.guide is not None and not reason:
            sequence.guide.advance(token)
        if not reason and len(sequence.token_ids) >= sequence.max_len:
            reason = "length"
        if reason:
            self._finish(sequence, reason)
            return
        if sequence.status is Status.RUNNING:
            self.blocks.publish(sequence)
        if sequence.request.stream and not sequence.group.params.picks_best:
            self._emit(sequence, sequence.index, "")

    def _finish(self, sequence: Sequence, reason: str) -> None:
        self._leave(sequence)
        group = sequence.group
        group.unfinished.remove(sequence)
        self._emit_answers(group, group.strategy.end(sequence, reason))
        if not group.unfinished:
            self._forget(group)

    def _leave(self, sequence: Sequence) -> None:
        """Takes a sequence that has ended out of its queue; what it has computed stays findable."""
        if sequence.status is Status.RUNNING:
            self.blocks.publish(sequence)
            self._release(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        sequence.status = Status.FINISHED

    def _forget(self, group: SequenceGroup) -> None:
        del self._groups[group.request.number]
        self.observed.e2e_s.append((self._now() - group.arrival_ns) / 1e9)

    # -- beams -------------------------------------------------------------------------------------------------------

    def _go_on_with_beams(self, group: SequenceGroup) -> None:
        """The next step of a beam search, once the candidates of all its beams are there."""
        search, beams = group.strategy, group.unfinished
        assert isinstance(search, BeamSearch)
        if any(beam.candidates is None for beam in beams):
            return
        following = search.go_on(beams)
        self.counters.generated_tokens += len(following)
        if not following:
            if not search.finished:
                raise RequestError(no_token_left(beams[0]))
            self._answer_beams(group, search)
            return
        group.unfinished = [child for _, child in following]
        self._replace_beams(beams, following)

    def _replace_beams(self, beams: list[Sequence], following: list[tuple[Sequence, Sequence]]) -> None:
        # Blocks get their new owners before the old ones let go, whose rows the new ones need.
        for parent, child in following:
            self.blocks.fork(parent, child)
            child.num_computed = parent.num_computed
        for beam in beams:
            self._leave(beam)
        for _, child in following:
            if child.blocks and self._rows:
                self._start(child)
            else:  # its parent was preempted, or other beams that were have not left rows enough
                self.blocks.free(child)
                child.num_computed = 0
                self._enqueue(child)

    def _answer_beams(self, group: SequenceGroup, search: BeamSearch, reason: str = "") -> None:
        """reason: why the search is ended from outside, where its beams are answers as they are."""
        beams, group.unfinished = group.unfinished, []
        for beam in beams:
            self._leave(beam)
        self._emit_answers(group, search.answers(beams if reason else [], reason or "stop"))
        self._forget(group)

    # -- outputs -----------------------------------------------------------------------------------------------------

    def _emit_answers(self, group: SequenceGroup, answers: Iterable[Answer]) -> None:
        for answer in answers:
            if answer.sequence is None:
                self._outputs.append(empty_output(group, answer))
                continue
            self._observe_pace(answer.sequence)
            self._emit(answer.sequence, answer.index, answer.reason)

    def _observe_pace(self, sequence: Sequence) -> None:
        num_tokens, group = len(sequence.token_ids) - sequence.num_prompt, sequence.group
        if num_tokens > 1:
            self.observed.tpot_s.append((group.last_token_ns - group.first_token_ns) / 1e9 / (num_tokens - 1))

    def _emit(self, sequence: Sequence, index: int, reason: str) -> None:
        ids = sequence.stops.take(is_last=bool(reason))
        if not ids and not reason:
            return
        group = sequence.group
        prompt_scores: list[TokenScore] = []
        context_logits: list[np.ndarray] = []
        if index == 0:
            prompt_scores, group.prompt_scores = group.prompt_scores, []
            context_logits, group.context_logits = group.context_logits, []
        scores, sequence.scores = sequence.scores[: len(ids)], sequence.scores[len(ids) :]
        logits, sequence.logits = sequence.logits[: len(ids)], sequence.logits[len(ids) :]
        self._outputs.append(
            Output(
                number=group.request.number,
                index=index,
                ids=ids,
                num_cut=sequence.stops.num_cut if reason else 0,
                finish_reason=reason,
                num_cached_tokens=group.num_cached,
                cumulative_logprob=sequence.cumulative_logprob,
                scores=scores if group.params.logprobs is not None else [],
                prompt_scores=prompt_scores,
                context_logits=b"".join(row.tobytes() for row in context_logits),
                generation_logits=b"".join(row.tobytes() for row in logits),
                timings=group.timings,
            )
        )

    def take_outputs(self) -> list[Output]:
        """The outputs since the last call."""
        outputs, self._outputs = self._outputs, []
        return outputs

    def take_refusals(self) -> list[Refusal]:
        """The requests that turned out to be wrong since the last call; nothing more comes of them."""
        refusals, self._refusals = self._refusals, []
        return refusals

    def check_integrity(self) -> None:
        """Raises AssertionError unless rows, blocks and states agree (see BlockManager.check_integrity)."""
        self.blocks.check_integrity(self.running)
        rows = [sequence.row for sequence in self.running]
        assert sorted(rows + self._rows) == list(range(self._settings.max_num_seqs)), (rows, self._rows)
        assert all(s.status is Status.RUNNING for s in self.running)
        assert all(s.status is Status.WAITING and not s.blocks for s in self.waiting)


def num_rows_for(sequence: Sequence) -> int:
    """How many rows a waiting sequence must find: its own, its followers', and those of the beams that it will become."""
    group = sequence.group
    further_beams = group.params.beam_width - len(group.unfinished) if group.is_beam_search else 0
    return 1 + len(sequence.followers) + further_beams


def _scores(scores: TokenScores | None) -> list[TokenScore]:
    if scores is None:
        return []
    columns = (scores.logprobs.tolist(), scores.ranks.tolist(), scores.top_ids.tolist(), scores.top_logprobs.tolist())
    return [TokenScore(*row) for row in zip(*columns, strict=True)]


def _of_each_beam(found: BeamCandidates | None) -> list[BeamCandidates]:
    """The candidates of each beam by itself: [k] each, and its top_ids and top_logprobs [w]."""
    if found is None:
        return []
    return [BeamCandidates(*(column[i] for column in vars(found).values())) for i in range(len(found.ids))]


def no_token_left(sequence: Sequence) -> str:
    count = len(sequence.token_ids) - sequence.num_prompt
    return (
        f"no token is left to choose after {count} tokens of the answer: the request's rules (a grammar, allowed_token_ids, bad_words, "
        "min_tokens, biases) exclude all together, or the model's logits are no finite numbers"
    )


def empty_output(group: SequenceGroup, answer: Answer) -> Output:
    """An answer without tokens, very unlikely, but with a finite log-probability."""
    prompt_scores, context_logits = (group.prompt_scores, group.context_logits) if answer.index == 0 else ([], [])
    return Output(
        number=group.request.number,
        index=answer.index,
        ids=[],
        finish_reason=answer.reason,
        num_cached_tokens=group.num_cached,
        cumulative_logprob=-9999.0,
        prompt_scores=prompt_scores,
        context_logits=b"".join(row.tobytes() for row in context_logits),
        timings=group.timings,
    )


def _trimmed(score: TokenScore, num_top: int) -> TokenScore:
    return TokenScore(score.logprob, score.rank, score.top_ids[:num_top], score.top_logprobs[:num_top])
