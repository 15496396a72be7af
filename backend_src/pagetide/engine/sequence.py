"""The mutable state of sequences and of the requests they belong to: the only thing in the engine that changes while a request runs.

[0 ......... num_computed)          in the cache, or on the way there
[num_computed ...... num_wanted)    what the next steps have to compute
[len(token_ids) .... num_wanted)    sampled by steps in flight, not yet seen by the host (num_pending)
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING

import numpy as np

from pagetide.engine.guides import GuideState
from pagetide.engine.stops import StopChecker
from pagetide.runner.plan import BeamCandidates, RowParams
from pagetide.types import Request, SamplingParams, Timings, TokenScore

if TYPE_CHECKING:
    from pagetide.engine.strategies import Strategy


class Status(Enum):
    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(eq=False)
class SequenceGroup:
    """A request and its sequences. Times in ns on the monotonic clock, 0: not yet.

    unfinished: its sequences that have not ended. num_cached: tokens of the prompt that the cache held at the first admission.
    allowed_bits: the request's allowed_token_ids as a mask int32 [vocabulary / 32], if it has a guide too.
    num_looked: prompt tokens whose successor's log-probability has been asked for (see StepPlan); prompt_scores, context_logits: what came.
    """

    request: Request
    strategy: Strategy
    arrival_ns: int
    unfinished: list[Sequence] = field(default_factory=list)
    first_scheduled_ns: int = 0
    first_token_ns: int = 0
    last_token_ns: int = 0
    num_cached: int = 0
    num_new_blocks: int = 0
    num_reused_blocks: int = 0
    num_looked: int = 0
    allowed_bits: np.ndarray | None = None
    prompt_scores: list[TokenScore] = field(default_factory=list)
    context_logits: list[np.ndarray] = field(default_factory=list)

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    @property
    def is_beam_search(self) -> bool:
        return self.params.beam_width > 1

    @property
    def looks_at_prompt(self) -> bool:
        return self.params.prompt_logprobs is not None or self.request.context_logits

    @property
    def timings(self) -> Timings:
        times = (self.arrival_ns, self.first_scheduled_ns, self.first_token_ns, self.last_token_ns)
        return Timings(*times, self.num_reused_blocks, self.num_new_blocks)


@dataclass(eq=False)
class Sequence:
    """One sample or beam of a request. Counts are in tokens.

    order: (priority, arrival in the engine), unique; a preempted sequence keeps its place.
    followers: samples of the same prompt that fork from this one when its prompt has been computed.
    is_plain: asks for nothing but tokens, and changes no logits. is_placed: its row on the device holds its tokens and blocks.
    candidates: what a beam may go on with ([k] each), until all beams of the group know. beam_score: what beams are compared by: the sum of
        the log-probabilities after all changes of logits; cumulative_logprob: of the model's own.
    hashes: the hash chain of the full blocks, as far as it has been needed; num_published: how many of them can be found.
    scores, logits: of tokens that have not been emitted.
    """

    group: SequenceGroup
    index: int
    order: tuple[int, int]
    token_ids: list[int]
    max_len: int
    stops: StopChecker
    sampling: RowParams
    is_plain: bool
    guide: GuideState | None = None
    followers: list[Sequence] = field(default_factory=list)
    status: Status = Status.WAITING
    row: int = -1
    is_placed: bool = False
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

    @property
    def request(self) -> Request:
        return self.group.request

    @property
    def num_prompt(self) -> int:
        return len(self.group.request.prompt_ids)

    @property
    def num_wanted(self) -> int:
        """How many tokens should be in the cache before the next one can be sampled."""
        return len(self.token_ids) + self.num_pending

    @property
    def can_run(self) -> bool:
        """False while all its tokens are there or on the way, or its next one has to be chosen by the host."""
        if self.group.is_beam_search and (self.num_pending or self.candidates is not None):
            return False
        return self.num_wanted < self.max_len

    @property
    def is_finished(self) -> bool:
        return self.status is Status.FINISHED

    def child(self, place: int) -> Sequence:
        """A beam that goes on with one of the candidates; it has no row and no blocks yet."""
        found, num_top = self.candidates, self.group.params.logprobs or 0
        assert found is not None
        logprob = float(found.logprobs[place])
        score = TokenScore(logprob, int(found.ranks[place]), found.top_ids[:num_top].tolist(), found.top_logprobs[:num_top].tolist())
        following = copy.copy(self)
        following.token_ids = [*self.token_ids, int(found.ids[place])]
        following.stops = self.stops.copy()
        following.scores = [*self.scores, score]
        following.cumulative_logprob = self.cumulative_logprob + logprob
        following.beam_score = self.beam_score + float(found.scores[place])
        following.status, following.row, following.is_placed = Status.WAITING, -1, False
        following.candidates, following.num_computed = None, 0
        following.blocks, following.hashes, following.num_published = [], list(self.hashes), 0
        return following
