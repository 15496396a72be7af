"""The mutable state of a sequence: the only thing in the engine that changes while a request runs.

[0 ......... num_computed)          in the cache, or on the way there
[num_computed ...... num_wanted)    what the next steps have to compute
[len(token_ids) .... num_wanted)    sampled by steps in flight, not yet seen by the host (num_pending)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

from pagetide.engine.stops import StopChecker
from pagetide.types import Request


class Status(Enum):
    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(eq=False)
class Sequence:
    """One sample of a request. Counts are in tokens.

    followers: samples of the same prompt that fork from this one when its prompt has been computed.
    hashes: the hash chain of the full blocks, as far as it has been needed; num_published: how many of them can be found.
    arrival: order of arrival in the engine, unique; a preempted sequence keeps its place.
    num_cached: tokens of the prompt that were found in the cache at the first admission; -1 before it.
    """

    request: Request
    index: int
    seed: int
    token_ids: list[int]
    num_prompt: int
    max_len: int
    stops: StopChecker
    arrival: int
    followers: list[Sequence] = field(default_factory=list)
    status: Status = Status.WAITING
    row: int = -1
    num_computed: int = 0
    num_pending: int = 0
    num_cached: int = -1
    blocks: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    num_published: int = 0

    @property
    def num_wanted(self) -> int:
        """How many tokens should be in the cache before the next one can be sampled."""
        return len(self.token_ids) + self.num_pending

    @property
    def is_at_limit(self) -> bool:
        """True when the steps in flight already give it all tokens it may have."""
        return self.num_wanted >= self.max_len

    @property
    def is_finished(self) -> bool:
        return self.status is Status.FINISHED
