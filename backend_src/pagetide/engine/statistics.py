"""What an engine has done: counts since its start, and single observations between two reports."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

_MAX_OBSERVATIONS = 20_000  # nobody may be there to take them


def _observations() -> deque[Any]:
    return deque(maxlen=_MAX_OBSERVATIONS)


@dataclass
class Counters:
    steps: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    cancelled: int = 0
    timed_out: int = 0
    failed: int = 0


@dataclass
class Observations:
    """Seconds from a request's arrival to its admission, first token and end, and between the tokens of each answer; sizes of steps."""

    queue_s: deque[float] = field(default_factory=_observations)
    ttft_s: deque[float] = field(default_factory=_observations)
    tpot_s: deque[float] = field(default_factory=_observations)
    e2e_s: deque[float] = field(default_factory=_observations)
    step_tokens: deque[int] = field(default_factory=_observations)
    step_sequences: deque[int] = field(default_factory=_observations)
