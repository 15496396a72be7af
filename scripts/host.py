"""The host's time for each step: scheduling, taking tokens and making outputs, on a device that computes
nothing.

Called by scripts/benchmark.py --host. What a step of the model costs beside it is left out, the host's work
of the runner too.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from pagetide.config import make_settings
from pagetide.engine.blocks import BlockManager
from pagetide.engine.engine import Engine
from pagetide.engine.groups import ModelLimits
from pagetide.engine.guides import GrammarCompiler
from pagetide.engine.scheduler import Scheduler
from pagetide.runner.plan import StepPlan, StepTokens
from pagetide.text.tokens import Vocabulary
from pagetide.types import EngineInfo, Request, SamplingParams

VOCABULARY = 32_000
BLOCK_SIZE = 16
MAX_LEN = 1024
NUM_PROMPT = 128
NUM_STEPS = 400


@dataclass
class IdleRunner:
    """A StepRunner whose tokens are there at once, and always the same. seconds: spent in it."""

    seconds: float = 0.0
    tokens: dict[int, int] = field(default_factory=dict)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        begin = time.thread_time()
        yield
        self.seconds += time.thread_time() - begin

    def forward(self, plan: StepPlan) -> None:
        pass

    def sample(self, plan: StepPlan, masks: np.ndarray | None = None) -> None:
        self.tokens[plan.step] = plan.num_sampled

    def wait(self, plan: StepPlan) -> StepTokens:
        with self._timed():
            return StepTokens(np.full(self.tokens.pop(plan.step), 1234))

    def close(self) -> None:
        pass


def decode_steps(num_sequences: int, stream: bool, **params: object) -> float:
    """Microseconds of processor time for each step of so many decoding sequences (median)."""
    num_blocks = num_sequences * MAX_LEN // BLOCK_SIZE
    settings = make_settings(max_num_seqs=num_sequences, max_num_batched_tokens=8192, num_blocks=num_blocks)
    table = [b"word"] * VOCABULARY
    vocabulary = Vocabulary(table, table)
    limits = ModelLimits(vocabulary, VOCABULARY, frozenset([2]), MAX_LEN, MAX_LEN)
    blocks = BlockManager(num_blocks, BLOCK_SIZE)
    scheduler = Scheduler(settings, limits, blocks, GrammarCompiler(vocabulary, VOCABULARY, [2]))
    info = EngineInfo("", VOCABULARY, MAX_LEN, num_sequences, 0, "cpu", num_blocks, BLOCK_SIZE, False)
    runner = IdleRunner()
    engine = Engine(info, scheduler, runner)
    rng = np.random.default_rng(0)
    asked = SamplingParams(temperature=0, ignore_eos=True, max_tokens=NUM_STEPS + 50, **params)
    for number in range(num_sequences):
        prompt = rng.integers(3, VOCABULARY, NUM_PROMPT).tolist()
        engine.add(Request(number=number, prompt_ids=prompt, params=asked, stream=stream))
    while len(scheduler.running) < num_sequences or any(
        s.num_computed < NUM_PROMPT for s in scheduler.running
    ):
        engine.step()
    times = []
    for _ in range(NUM_STEPS):
        before, begin = runner.seconds, time.thread_time()
        engine.step()
        times.append(time.thread_time() - begin - (runner.seconds - before))
    return 1e6 * statistics.median(times)


CASES: dict[str, dict[str, object]] = {
    "streams": {},
    "streams with two stop texts": {"stop": ("###", "\n\n\n")},
    "streams with penalties": {"presence_penalty": 0.5},
}


def measure(sizes: list[int]) -> dict[str, dict[int, float]]:
    """Microseconds by case and number of sequences."""
    return {
        name: {size: decode_steps(size, stream=True, **params) for size in sizes}
        for name, params in CASES.items()
    }


def table(times: dict[str, dict[int, float]]) -> str:
    sizes = list(next(iter(times.values())))
    lines = [
        "| host, us for each step | " + " | ".join(f"{size} sequences" for size in sizes) + " |",
        "| --- |" + " --- |" * len(sizes),
    ]
    lines += [
        f"| {name} | " + " | ".join(f"{by_size[size]:.0f}" for size in sizes) + " |"
        for name, by_size in times.items()
    ]
    return "\n".join(lines)
