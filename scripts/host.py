"""The host's time for each step on a device that computes nothing: scheduling, taking tokens and making
outputs; and with them what the runner does to queue a recorded step of a GPU and to bring its tokens back.

Called by scripts/benchmark.py --host. What only a driver does is left out: the launch itself, pinned memory.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from pagetide.config import make_settings
from pagetide.engine.blocks import BlockManager
from pagetide.engine.engine import Engine, StepRunner
from pagetide.engine.groups import ModelLimits
from pagetide.engine.guides import GrammarCompiler
from pagetide.engine.scheduler import Scheduler
from pagetide.ops.batch import Batch
from pagetide.ops.plain import REFERENCE
from pagetide.runner.device import CudaDevice
from pagetide.runner.plan import StepPlan, StepTokens
from pagetide.runner.rows import Rows
from pagetide.runner.runner import Runner
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


class IdleDevice(CudaDevice):
    """A GPU whose recorded steps do nothing when they are replayed: their results stay as they are."""

    def __init__(self) -> None:
        self.records, self.torch_device = True, torch.device("cpu")

    def fetch(
        self, function: Callable[..., list[torch.Tensor]], *args: Any
    ) -> Callable[[], list[np.ndarray]]:
        results = function(*args)
        return lambda: [result.numpy() for result in results]

    def record(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        result = function()
        return lambda: None, result


class IdleDecoder:
    """Thinks all tokens alike."""

    def forward(self, batch: Batch, pool: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(batch.logit_index), VOCABULARY)


def recording_runner(num_sequences: int) -> Runner:
    """A runner whose decode steps are recorded, as a GPU's are."""
    device, nothing = IdleDevice(), torch.empty(0)
    rows = Rows(num_sequences, MAX_LEN, BLOCK_SIZE, VOCABULARY, device.torch_device)
    store = SimpleNamespace(pool=nothing, host_pool=nothing)
    ops = dataclasses.replace(REFERENCE, can_record=True)
    runner = Runner(device, IdleDecoder(), store, ops, rows, BLOCK_SIZE)  # type: ignore[arg-type]
    runner.record_decode(num_sequences)
    return runner


def decode_steps(num_sequences: int, runner: StepRunner, **params: object) -> float:
    """Microseconds of processor time for each step of so many decoding sequences (median), without what an
    IdleRunner notes.
    """
    num_blocks = num_sequences * MAX_LEN // BLOCK_SIZE
    settings = make_settings(max_num_seqs=num_sequences, max_num_batched_tokens=8192, num_blocks=num_blocks)
    table = [b"word"] * VOCABULARY
    vocabulary = Vocabulary(table, table)
    limits = ModelLimits(vocabulary, VOCABULARY, frozenset([2]), MAX_LEN, MAX_LEN)
    blocks = BlockManager(num_blocks, BLOCK_SIZE)
    scheduler = Scheduler(settings, limits, blocks, GrammarCompiler(vocabulary, VOCABULARY, [2]))
    info = EngineInfo("", VOCABULARY, MAX_LEN, num_sequences, 0, "cpu", num_blocks, BLOCK_SIZE, False)
    engine = Engine(info, scheduler, runner)
    rng = np.random.default_rng(0)
    asked = SamplingParams(temperature=0, ignore_eos=True, max_tokens=NUM_STEPS + 50, **params)
    for number in range(num_sequences):
        prompt = rng.integers(3, VOCABULARY, NUM_PROMPT).tolist()
        engine.add(Request(number=number, prompt_ids=prompt, params=asked, stream=True))
    while len(scheduler.running) < num_sequences or any(
        s.num_computed < NUM_PROMPT for s in scheduler.running
    ):
        engine.step()
    times = []
    for _ in range(NUM_STEPS):
        before, begin = _spent_in(runner), time.thread_time()
        engine.step()
        times.append(time.thread_time() - begin - (_spent_in(runner) - before))
    return 1e6 * statistics.median(times)


def _spent_in(runner: StepRunner) -> float:
    return runner.seconds if isinstance(runner, IdleRunner) else 0.0


CASES: dict[str, dict[str, object]] = {
    "streams": {},
    "streams with two stop texts": {"stop": ("###", "\n\n\n")},
    "streams with penalties": {"presence_penalty": 0.5},
}


def measure(sizes: list[int]) -> dict[str, dict[int, float]]:
    """Microseconds by case and number of sequences."""
    found = {
        name: {size: decode_steps(size, IdleRunner(), **params) for size in sizes}
        for name, params in CASES.items()
    }
    # Plain streams only: penalties are computed behind a recorded step, which takes this device time.
    found["streams, with the runner"] = {size: decode_steps(size, recording_runner(size)) for size in sizes}
    return found


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
