"""The requests that have not ended: their queueing limit, deadlines, grammars and adapters, and the faults of
single ones.
"""

from __future__ import annotations

import heapq
import logging
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from pagetide.engine.adapters import Adapter, AdapterSource
from pagetide.engine.fairness import Turns
from pagetide.engine.groups import ModelLimits, give_guides, group_of
from pagetide.engine.guides import GuideCompiler, GuideState
from pagetide.engine.journal import Journal
from pagetide.engine.sequence import Sequence, SequenceGroup
from pagetide.engine.statistics import Counters, Observations
from pagetide.runner.plan import bits_of
from pagetide.types import EngineError, QueueFullError, Request, RequestError

log = logging.getLogger("pagetide.requests")

_NEEDS_WAIT_S = 0.005


@dataclass(frozen=True)
class Refusal:
    """A request that cannot be answered, found out after it had been taken.

    error: RequestError if it is the client's fault.
    """

    number: int
    error: Exception


@dataclass
class Needs:
    """What a request waits for before it can run: its grammar, its adapter."""

    guide: Future[Callable[[], GuideState]] | None
    lora_name: str
    adapter: Future[Adapter] | None = None

    @property
    def futures(self) -> list[Future[Any]]:
        """Those on their way."""
        return [future for future in (self.guide, self.adapter) if future is not None]

    def advance(self, adapters: AdapterSource) -> bool:
        """Begins what could not begin before; True if all is there."""
        if self.lora_name and self.adapter is None:
            self.adapter = adapters.start(self.lora_name)
        waits = self.lora_name and self.adapter is None
        return not waits and all(future.done() for future in self.futures)


class Requests:
    """Takes requests in, and keeps them until they end.

    max_requests: more are refused. leave: takes a sequence that has ended out of its queue. now: in ns.
    max_queue_ns: so long a request may wait; 0: for ever.
    """

    def __init__(
        self,
        max_requests: int,
        limits: ModelLimits,
        guides: GuideCompiler,
        counters: Counters,
        observed: Observations,
        journal: Journal,
        leave: Callable[[Sequence], None],
        now: Callable[[], int],
        turns: Turns,
        max_queue_ns: int,
        adapters: AdapterSource,
    ):
        self._max_requests = max_requests
        self._limits = limits
        self._guides = guides
        self._counters = counters
        self._observed = observed
        self._journal = journal
        self._leave = leave
        self._now = now
        self._groups: dict[int, SequenceGroup] = {}
        self._adapters = adapters
        self._preparing: dict[int, Needs] = {}
        self._turns = turns
        self._max_queue_ns = max_queue_ns
        self._queued: deque[tuple[int, int]] = deque()  # until when each of them may wait, in their order
        self._deadlines: list[tuple[int, int]] = []  # heap of (deadline, request number)
        self._refusals: list[Refusal] = []
        self._arrivals = 0
        self._end_bits = bits_of((i for i in limits.end_ids if i < limits.vocab_size), limits.vocab_size)

    @property
    def has_room(self) -> bool:
        """True if add() does not raise QueueFullError."""
        return len(self._groups) < self._max_requests

    @property
    def num_preparing(self) -> int:
        """Requests that wait for their grammar or adapter."""
        return len(self._preparing)

    @property
    def has_news(self) -> bool:
        """True if something will come of these requests without any step."""
        return bool(self._refusals or self._preparing)

    def add(self, request: Request) -> SequenceGroup | None:
        """Takes a request that has been checked; None: its grammar has to be compiled, or its adapter read,
        first.

        Raises QueueFullError, RequestError, EngineError.
        """
        if not self.has_room:
            limit = self._max_requests
            raise QueueFullError(
                f"Exceeds maximum queue size: Maximum queue size of {limit} requests reached"
            )
        turn, cost = self._turns.take(request)
        try:
            group = group_of(request, self._limits, turn, self._arrivals, self._now())
        except Exception as error:
            self._turns.note_end(request, cost)
            if isinstance(error, RequestError):
                raise
            raise internal_error(error) from error
        group.cost = cost
        self._arrivals += len(group.unfinished)
        self._groups[request.number] = group
        if request.deadline_ns:
            self._note_deadline(request)
        if self._max_queue_ns:
            self._queued.append((self._now() + self._max_queue_ns, request.number))
        if request.params.guide is None and not request.lora_name:
            return group
        with self.on_behalf_of(group):
            guide = request.params.guide
            compiled = None if guide is None else self._guides.compile(guide)
            self._preparing[request.number] = Needs(compiled, request.lora_name)
        return None

    def find(self, number: int) -> SequenceGroup | None:
        """The unfinished request with this number."""
        return self._groups.get(number)

    def numbers_of(self, request_id: str) -> list[int]:
        """The numbers of the unfinished requests that their client calls request_id."""
        return [number for number, group in self._groups.items() if group.request.request_id == request_id]

    def forget(self, group: SequenceGroup) -> None:
        """The request has its last answer."""
        self._note_end(group)
        self._stop_preparing(group.request.number)
        group.adapter = None
        del self._groups[group.request.number]
        self._observed.e2e_s.append((self._now() - group.arrival_ns) / 1e9)
        self._journal.close(group)

    # -- deadlines ---------------------------------------------------------------------------------------

    def _note_deadline(self, request: Request) -> None:
        heapq.heappush(self._deadlines, (request.deadline_ns, request.number))
        if len(self._deadlines) > 2 * len(self._groups) + 64:  # most are of requests that ended long before
            self._deadlines = [entry for entry in self._deadlines if entry[1] in self._groups]
            heapq.heapify(self._deadlines)

    def take_late(self) -> list[int]:
        """The numbers of the unfinished requests whose deadline has passed, each of them once."""
        now, late = self._now(), []
        while self._deadlines and self._deadlines[0][0] <= now:
            _, number = heapq.heappop(self._deadlines)
            if number in self._groups:
                late.append(number)
        return late

    def take_overdue(self) -> list[SequenceGroup]:
        """The requests that still wait though their time for that is up, each of them once."""
        now, overdue = self._now(), []
        while self._queued and self._queued[0][0] <= now:
            group = self._groups.get(self._queued.popleft()[1])
            if group is not None and not group.has_run:
                overdue.append(group)
        return overdue

    # -- what goes wrong because of one request ------------------------------------------------------------

    @contextmanager
    def on_behalf_of(self, group: SequenceGroup) -> Iterator[None]:
        """Whatever is raised inside belongs to this request: it fails, and nobody else notices."""
        try:
            yield
        except BaseException as error:  # a panic of a library written in Rust is no Exception
            self.fail(group, error)

    def fail(self, group: SequenceGroup, error: BaseException) -> None:
        """Ends a request with an error in place of its further answers; raises what is meant for the
        process.
        """
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise error
        if not isinstance(error, RequestError | QueueFullError):
            error = internal_error(error)
        if self._groups.pop(group.request.number, None) is None:
            return  # it has ended in another way already
        self._note_end(group)
        self._counters.failed += 1
        self._journal.close(group, error)
        self._stop_preparing(group.request.number)
        for sequence in group.unfinished:
            self._leave(sequence)
        group.unfinished = []
        group.adapter = None
        self._refusals.append(Refusal(group.request.number, error))

    def _note_end(self, group: SequenceGroup) -> None:
        if not group.has_run:
            self._turns.note_end(group.request, group.cost)

    def take_refusals(self) -> list[Refusal]:
        """The requests that turned out to be wrong since the last call; nothing more comes of them."""
        refusals, self._refusals = self._refusals, []
        return refusals

    # -- what requests wait for ------------------------------------------------------------------------------

    def wait_for_needs(self) -> None:
        """A short wait, for when nothing can be done until some grammar or adapter is there."""
        wait([future for needs in self._preparing.values() for future in needs.futures], _NEEDS_WAIT_S)

    def take_prepared(self) -> list[SequenceGroup]:
        """The requests that have become ready; those whose grammars or adapters are none are refused."""
        ready = []
        for number in list(self._preparing):
            needs, group = self._preparing[number], self._groups[number]
            with self.on_behalf_of(group):
                if not needs.advance(self._adapters):
                    continue
                del self._preparing[number]
                if needs.guide is not None:
                    give_guides(group, needs.guide.result())
                if needs.adapter is not None:
                    group.adapter = needs.adapter.result()
                ready.append(group)
        return ready

    def _stop_preparing(self, number: int) -> None:
        needs = self._preparing.pop(number, None)
        if needs is not None and needs.guide is not None:  # others may wait for the same adapter
            needs.guide.cancel()

    def masks(self, sequences: list[Sequence]) -> np.ndarray:
        """Which token each of these guided sequences may sample next: int32 [g, vocabulary / 32].

        All their tokens before it are known. A sequence that has ended may sample any.
        """
        masks = np.full((len(sequences), len(self._end_bits)), -1, np.int32)
        for mask, sequence in zip(masks, sequences, strict=True):
            if sequence.guide is not None and not sequence.is_finished:
                with self.on_behalf_of(sequence.group):
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


def internal_error(error: BaseException) -> EngineError:
    """What the client is told of an error that is not its own; the log has all of it."""
    log.error("a request has failed", exc_info=error)
    return EngineError(f"the engine failed at this request ({type(error).__name__})")
