"""The mutable state of sequences and of the requests they belong to: the only thing in the engine that
changes while a request runs.

[0 ......... num_computed)          in the cache, or on the way there
[num_computed ...... num_wanted)    what the next steps have to compute
[len(token_ids) .... num_wanted)    sampled by steps in flight, not yet seen by the host (num_pending)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Protocol

import numpy as np

from pagetide.engine.adapters import Adapter
from pagetide.engine.drafts import Speculator
from pagetide.engine.guides import GuideState
from pagetide.engine.stops import StopChecker
from pagetide.runner.plan import NO_ADAPTER, BeamCandidates, RowParams
from pagetide.types import Request, SamplingParams, Timings, TokenScore

_NO_TIMINGS = Timings()


class Status(Enum):
    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(frozen=True)
class Answer:
    """A sequence as its client sees it; None where there is none: an answer without tokens."""

    sequence: Sequence | None
    index: int
    reason: str


class Strategy(Protocol):
    """How the sequences of a request become its answers."""

    def end(self, sequences: list[Sequence], reason: str) -> list[Answer]:
        """Takes sequences that have ended: one by itself, or from outside all that were left.

        Returns the answers that are known now.
        """


class Search(Strategy, Protocol):
    """A strategy by which the host chooses how sequences go on, from the candidates of all of them.

    num_for_each: how many candidates of each sequence it looks at.
    """

    num_for_each: int

    def go_on(self, beams: list[Sequence]) -> list[tuple[Sequence, Sequence]]:
        """(beam, its continuation) for the next step; none when the search is over. All have candidates."""


@dataclass(eq=False, slots=True)
class SequenceGroup:
    """A request and its sequences. Times in ns on the monotonic clock, 0: not yet.

    search: the strategy, if it is one that searches.
    unfinished: its sequences that have not ended.
    num_cached: tokens of the prompt that the cache held at the first admission.
    allowed_bits: allowed_token_ids as a mask int32 [vocabulary / 32], if the request has a guide too.
    streams: its tokens are shown as they come.
    reports_tokens: log-probabilities or logits of the answer's tokens are needed.
    reports_prompt: what the model thinks of the prompt's own tokens is asked for.
    num_prompt_reported: prompt tokens whose successor's log-probability, or whose logits, have been asked
        for (see StepPlan); prompt_scores, context_logits: what came.
    reasons, num_generated: of the answers that have ended, for the journal.
    num_drafted, num_accepted: guesses of its tokens, and how many of them were right.
    overtook: numbers of the requests that lacked rows when this one was admitted past them.
    adapter: what its model has, None: nothing; adapter_place: where that lies while it runs.
    """

    request: Request
    strategy: Strategy
    search: Search | None
    arrival_ns: int
    unfinished: list[Sequence] = field(default_factory=list)
    has_run: bool = False
    queued_ns: int = 0
    cost: int = 0  # in tokens, as far as that could be told when it came
    first_scheduled_ns: int = 0
    first_token_ns: int = 0
    last_token_ns: int = 0
    num_cached: int = 0
    num_new_blocks: int = 0
    num_reused_blocks: int = 0
    num_prompt_reported: int = 0
    allowed_bits: np.ndarray | None = None
    prompt_scores: list[TokenScore] = field(default_factory=list)
    context_logits: list[np.ndarray] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    num_generated: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    overtook: frozenset[int] = frozenset()
    adapter: Adapter | None = None
    adapter_place: int = NO_ADAPTER
    params: SamplingParams = field(init=False)
    is_beam_search: bool = field(init=False)
    streams: bool = field(init=False)
    reports_tokens: bool = field(init=False)
    reports_prompt: bool = field(init=False)

    def __post_init__(self) -> None:
        request = self.request
        self.params = request.params
        self.is_beam_search = self.search is not None
        self.streams = request.stream and not request.params.picks_best
        self.reports_tokens = (
            request.params.logprobs is not None or request.params.picks_best or request.generation_logits
        )
        self.reports_prompt = request.params.prompt_logprobs is not None or request.context_logits

    @property
    def may_be_guessed(self) -> bool:
        """False where each next token depends on what the host makes of the one before."""
        return self.search is None and self.params.guide is None

    @property
    def adapter_key(self) -> str:
        """Empty for none."""
        return "" if self.adapter is None else self.adapter.key

    @property
    def timings(self) -> Timings:
        """What has happened to the request so far, if it asks for that."""
        if not self.request.timings:
            return _NO_TIMINGS
        times = (self.arrival_ns, self.first_scheduled_ns, self.first_token_ns, self.last_token_ns)
        blocks = (self.num_reused_blocks, self.num_new_blocks)
        return Timings(*times, *blocks, self.num_drafted, self.num_accepted)


@dataclass(eq=False, slots=True)
class Sequence:
    """One sample or beam of a request. Counts are in tokens.

    order: (priority, its user's turn, arrival in the engine), unique; a preempted sequence keeps its place.
    followers: samples of the same prompt that fork from this one when its prompt has been computed.
    is_plain: asks for nothing but tokens, and changes no logits.
    speculator: what guesses its tokens, if anything does.
    num_placed: blocks that its row on the device knows; None: the row does not have its tokens either.
    candidates: what a beam may go on with ([k] each), until all beams of the group know.
    cumulative_logprob: of its tokens under the model's own distribution; beam_score: the same after all
        changes of the logits, by which beams are compared.
    hashes: the hash chain of the full blocks, as far as it has been needed; num_published: how many of
        them can be found.
    scores, logits: of tokens that have not been emitted.
    """

    group: SequenceGroup
    index: int
    order: tuple[int, float, int]
    token_ids: list[int]
    max_len: int
    stops: StopChecker
    sampling: RowParams
    is_plain: bool
    guide: GuideState | None = None
    speculator: Speculator | None = None
    followers: list[Sequence] = field(default_factory=list)
    status: Status = Status.WAITING
    row: int = -1
    num_placed: int | None = None
    num_computed: int = 0
    num_pending: int = 0
    candidates: BeamCandidates | None = None
    blocks: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    num_published: int = 0
    cumulative_logprob: float = 0.0
    beam_score: float = 0.0
    scores: list[TokenScore] = field(default_factory=list)
    logits: list[np.ndarray] = field(default_factory=list)
    request: Request = field(init=False)
    num_prompt: int = field(init=False)

    def __post_init__(self) -> None:
        self.request = self.group.request
        self.num_prompt = len(self.request.prompt_ids)

    @property
    def num_wanted(self) -> int:
        """How many tokens should be in the cache before the next one can be sampled."""
        return len(self.token_ids) + self.num_pending

    @property
    def num_guessed(self) -> int:
        """Tokens behind those, which the next step computes as if they were the answer's."""
        return 0 if self.speculator is None else len(self.speculator.guesses)

    @property
    def gets_more(self) -> bool:
        """Whether the step whose tokens are being taken has more of them for it."""
        return self.speculator is not None and self.num_pending > self.speculator.num_lost

    @property
    def can_run(self) -> bool:
        """False while all its tokens are there or on the way, or the host has to choose its next one."""
        if self.group.is_beam_search and (self.num_pending or self.candidates is not None):
            return False
        return len(self.token_ids) + self.num_pending < self.max_len

    @property
    def is_finished(self) -> bool:
        return self.status is Status.FINISHED

    def child(self, place: int) -> Sequence:
        """A beam that goes on with one of the candidates; it waits, without a row and blocks."""
        found, num_top = self.candidates, self.group.params.logprobs or 0
        assert found is not None
        logprob = float(found.logprobs[place])
        top = found.top_ids[:num_top].tolist(), found.top_logprobs[:num_top].tolist()
        return Sequence(
            group=self.group,
            index=self.index,
            order=self.order,
            token_ids=[*self.token_ids, int(found.ids[place])],
            max_len=self.max_len,
            stops=self.stops.copy(),
            sampling=self.sampling,
            is_plain=self.is_plain,
            hashes=list(self.hashes),
            cumulative_logprob=self.cumulative_logprob + logprob,
            beam_score=self.beam_score + float(found.scores[place]),
            scores=[*self.scores, TokenScore(logprob, int(found.ranks[place]), *top)],
        )
