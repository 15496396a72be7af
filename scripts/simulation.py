"""Replicas of the engine on simulated time, requests sent to them by one rule or another, and what comes of
them. Used by scripts/simulate.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from lives import Life
from pagetide.config import make_settings
from pagetide.engine.blocks import BlockManager
from pagetide.engine.engine import Engine
from pagetide.engine.groups import ModelLimits
from pagetide.engine.guides import GrammarCompiler
from pagetide.engine.scheduler import Scheduler
from pagetide.gateway.routing import in_order
from pagetide.runner.plan import StepPlan, StepTokens
from pagetide.text.tokens import Vocabulary
from pagetide.types import EngineInfo, QueueFullError, Request, SamplingParams
from step_times import StepTimes
from traffic import VOCABULARY, Arrival, prompt_ids

MOST_REPLICAS = 512
LIMIT_SHARE = 0.99  # of the requests keep the limits

# -- replicas ----------------------------------------------------------------------------------------------


class TimedRunner:
    """A StepRunner whose steps take their time on a clock of their own, and bring always the same token."""

    def __init__(self, times: StepTimes):
        self.times = times
        self.clock = 0.0
        self._tokens: dict[int, int] = {}

    def forward(self, plan: StepPlan) -> None:
        self.clock += self.times.of(plan)

    def sample(self, plan: StepPlan, masks: np.ndarray | None = None) -> None:
        self._tokens[plan.step] = plan.num_sampled

    def wait(self, plan: StepPlan) -> StepTokens:
        return StepTokens(np.full(self._tokens.pop(plan.step), 1234))

    def close(self) -> None:
        pass


class Replica:
    """An engine on simulated time (see routing.Routed)."""

    def __init__(self, number: int, times: StepTimes):
        self.url = f"replica-{number}"
        self.num_open = 0
        self.rests_until = 0.0
        self.lives: dict[int, Life] = {}
        self.runner = TimedRunner(times)
        known = times.settings
        settings = make_settings(
            max_num_seqs=known["max_num_seqs"],
            max_num_batched_tokens=known["max_num_batched_tokens"],
            num_blocks=known["num_blocks"],
            block_size=known["block_size"],
            max_queued_requests=100_000,
        )
        table = [b"word"] * VOCABULARY
        vocabulary, longest = Vocabulary(table, table), known["max_model_len"]
        limits = ModelLimits(vocabulary, VOCABULARY, frozenset([2]), longest, longest)
        blocks = BlockManager(known["num_blocks"], known["block_size"])
        guides = GrammarCompiler(vocabulary, VOCABULARY, [2])
        scheduler = Scheduler(settings, limits, blocks, guides, lambda: int(self.runner.clock * 1e9))
        info = EngineInfo(
            "",
            VOCABULARY,
            longest,
            settings.max_num_seqs,
            0,
            "cpu",
            known["num_blocks"],
            known["block_size"],
            False,
        )
        self.engine = Engine(info, scheduler, self.runner, overlaps=False)

    def add(self, number: int, arrival: Arrival) -> None:
        life = self.lives[number] = Life(arrival.at)
        asked = SamplingParams(max_tokens=arrival.answer_tokens, ignore_eos=True, temperature=0.0)
        ids = prompt_ids(arrival, number)
        self.num_open += 1
        if len(ids) >= self.engine.info.max_model_len:
            self._end(life, is_refused=True)
            return
        try:
            self.engine.add(Request(number=number, prompt_ids=ids, params=asked, stream=True))
        except QueueFullError:
            self._end(life, is_refused=True)

    def run_until(self, now: float) -> None:
        """Begins every step that can begin before now."""
        while self.engine.has_work and self.runner.clock <= now:
            outputs, refusals = self.engine.step()
            for output in outputs:
                life = self.lives[output.number]
                life.take(len(output.ids), self.runner.clock)
                if output.finish_reason:
                    self._end(life)
            for refusal in refusals:
                self._end(self.lives[refusal.number], is_refused=True)
        if not self.engine.has_work:
            self.runner.clock = max(self.runner.clock, now)

    def _end(self, life: Life, is_refused: bool = False) -> None:
        life.is_done, life.is_refused = True, is_refused
        self.num_open -= 1


# -- routing -----------------------------------------------------------------------------------------------

Route = Callable[[Sequence[Replica], Arrival, int], Replica]


def round_robin(replicas: Sequence[Replica], arrival: Arrival, number: int) -> Replica:
    return replicas[number % len(replicas)]


def least_open(replicas: Sequence[Replica], arrival: Arrival, number: int) -> Replica:
    return min(replicas, key=lambda replica: replica.num_open)


def by_prefix(replicas: Sequence[Replica], arrival: Arrival, number: int) -> Replica:
    key = arrival.prefix or f"own {number}"
    return in_order(replicas, key.encode(), arrival.at)[0]


ROUTES: dict[str, Route] = {"round-robin": round_robin, "least-open": least_open, "prefix": by_prefix}


# -- results -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """Seconds; of requests that were answered. hit_rate: share of the prompts' tokens that were cached."""

    replicas: int
    routing: str
    tokens_per_s: float
    ttft: tuple[float, float, float]  # p50, p90, p99
    tpot: tuple[float, float, float]
    hit_rate: float
    refused: int
    lives: list[Life] = field(repr=False, default_factory=list)

    def keeps(self, ttft_s: float, tpot_s: float) -> bool:
        """Whether all but one of a hundred requests keep both limits."""
        good = sum(life.is_good(ttft_s, tpot_s) for life in self.lives)
        return good >= LIMIT_SHARE * len(self.lives)


def simulate(times: StepTimes, arrivals: Sequence[Arrival], num_replicas: int, routing: str) -> Outcome:
    """Runs until everything has been answered."""
    replicas = [Replica(i, times) for i in range(num_replicas)]
    for number, arrival in enumerate(arrivals):
        for replica in replicas:
            replica.run_until(arrival.at)
        ROUTES[routing](replicas, arrival, number).add(number, arrival)
    for replica in replicas:
        replica.run_until(float("inf"))
    lives = [life for replica in replicas for life in replica.lives.values()]
    counters = [replica.engine.scheduler.counters for replica in replicas]
    cached, prompts = (
        sum(getattr(counter, name) for counter in counters) for name in ("cached_tokens", "prompt_tokens")
    )
    return outcome(lives, num_replicas, routing, cached / max(1, prompts))


def outcome(lives: list[Life], replicas: int, routing: str, hit_rate: float = 0.0) -> Outcome:
    answered = [life for life in lives if life.is_done and not life.is_refused] or [Life(0.0)]
    begin, end = min(life.arrived for life in answered), max(life.last for life in answered)

    def quantiles(values: list[float]) -> tuple[float, float, float]:
        p50, p90, p99 = np.quantile(values, [0.5, 0.9, 0.99])
        return float(p50), float(p90), float(p99)

    return Outcome(
        replicas,
        routing,
        sum(life.num_tokens for life in answered) / max(1e-9, end - begin),
        quantiles([life.ttft for life in answered]),
        quantiles([life.tpot for life in answered]),
        hit_rate,
        sum(life.is_refused for life in lives),
        lives,
    )


def needed(
    times: StepTimes, arrivals: Sequence[Arrival], routing: str, ttft_s: float, tpot_s: float
) -> Outcome | None:
    """The fewest replicas that keep the limits; None if MOST_REPLICAS do not."""
    few, many, found = 0, 1, None
    while found is None:
        if many > MOST_REPLICAS:
            return None
        tried = simulate(times, arrivals, many, routing)
        if tried.keeps(ttft_s, tpot_s):
            found = tried
        else:
            few, many = many, 2 * many
    while many - few > 1:
        middle = (few + many) // 2
        tried = simulate(times, arrivals, middle, routing)
        if tried.keeps(ttft_s, tpot_s):
            many, found = middle, tried
        else:
            few = middle
    return found
