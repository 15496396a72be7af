"""What an engine has done: counts since its start, and single observations between two reports."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import msgspec

_MAX_OBSERVATIONS = 20_000  # nobody may be there to take them


def _observations() -> deque[Any]:
    return deque(maxlen=_MAX_OBSERVATIONS)


@dataclass
class Counters:
    steps: int = 0
    preemptions: int = 0
    swapped_out: int = 0  # blocks, to the host's memory
    swapped_in: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    cancelled: int = 0
    timed_out: int = 0
    failed: int = 0


@dataclass
class Observations:
    """Seconds from a request's arrival to its admission, first token and end, and between the tokens of each
    answer; sizes of steps.
    """

    queue_s: deque[float] = field(default_factory=_observations)
    ttft_s: deque[float] = field(default_factory=_observations)
    tpot_s: deque[float] = field(default_factory=_observations)
    e2e_s: deque[float] = field(default_factory=_observations)
    step_tokens: deque[int] = field(default_factory=_observations)
    step_sequences: deque[int] = field(default_factory=_observations)

    def take(self) -> dict[str, list[float]]:
        """All observations since the last call, by name."""
        taken = {name: list(values) for name, values in vars(self).items()}
        for values in vars(self).values():
            values.clear()
        return taken


class Statistics(msgspec.Struct, tag=True, frozen=True):
    """One report: what the engine holds now (sequences, KV blocks), what it has counted since its start, and
    what it has observed since the last report.
    """

    gauges: dict[str, int]
    counters: dict[str, int]
    observations: dict[str, list[float]]
