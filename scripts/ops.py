"""Where a step's time goes on a CPU: each op, with its share of what the machine's memory or its products
allow.

Called by scripts/benchmark.py --ops. The compiled layers note the processor's clock at the end of each
phase; the rest of a step is the head with what is around it, and the host.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pagetide.llm import LLM
from pagetide.models.config import DecoderConfig
from pagetide.models.families import read_model
from pagetide.ops.cpu.layers import PHASES
from pagetide.ops.cpu.sync import ticks
from pagetide.runner.plan import StepPlan, StepTokens
from pagetide.types import Request, SamplingParams


@dataclass(frozen=True)
class Case:
    """Steps of so many sequences, each with num_new tokens behind num_before in the cache."""

    name: str
    sequences: int
    num_before: int
    num_new: int

    @property
    def decodes(self) -> bool:
        return self.num_new == 1

    @property
    def num_tokens(self) -> int:
        return self.sequences * self.num_new


CASES = (
    Case("1 token", 1, 128, 1),
    Case("8 tokens", 8, 300, 1),
    Case("32 tokens", 32, 300, 1),
    Case("32 tokens, context 1,500", 32, 1500, 1),
    Case("prompt of 256", 1, 0, 256),
    Case("prompts of 8 x 64", 8, 0, 64),
    Case("last 512 of 2,048", 1, 1536, 512),
)
NUM_DECODE = 24  # steps of a case that decodes
NUM_PROMPTS = 4  # steps of a case of prompts


@dataclass
class WatchingRunner:
    """A StepRunner that notes what each step's forward pass and sampling take."""

    inner: Any
    layer_seconds: list[np.ndarray] = field(default_factory=list)
    device_seconds: list[float] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)
    ticks_per_second: float = 1.0
    began: float = 0.0

    def forward(self, plan: StepPlan) -> None:
        self.began = time.perf_counter()
        self.num_tokens.append(int(plan.counts.sum()))
        self.inner.forward(plan)

    def sample(self, plan: StepPlan, masks: np.ndarray | None = None) -> None:
        self.inner.sample(plan, masks)

    def wait(self, plan: StepPlan) -> StepTokens:
        tokens = self.inner.wait(plan)
        self.device_seconds.append(time.perf_counter() - self.began)
        self.layer_seconds.append(self.inner.decoder.layers.ticks.sum(0) / self.ticks_per_second)
        return tokens

    def close(self) -> None:
        self.inner.close()


@dataclass(frozen=True)
class Row:
    """One op of a case, per step (medians). limit: what memory or products would need at best, None where
    nothing says.
    """

    name: str
    seconds: float
    limit: float | None


def measure(
    model: str, cache_dir: str, limits: dict[str, float], cases: Iterable[Case] = CASES
) -> dict[str, list[Row]]:
    """Rows of every case. limits: read_gb_s and gflop_s of the machine."""
    llm = LLM(
        model, cache_dir=cache_dir, max_num_seqs=32, max_num_batched_tokens=512, enable_prefix_caching=False
    )
    watch = WatchingRunner(llm.engine.runner, ticks_per_second=_ticks_per_second())
    llm.engine.runner = watch

    _, config = read_model(Path(llm.engine.info.model))
    return {case.name: _rows(case, config, _steps(llm, watch, case), limits) for case in cases}


def _ticks_per_second() -> float:
    ticks()
    begin, before = time.perf_counter(), ticks()
    time.sleep(0.2)
    return (ticks() - before) / (time.perf_counter() - begin)


def _steps(llm: LLM, watch: WatchingRunner, case: Case) -> tuple[np.ndarray, float, float]:
    """Medians of the steps that have the case's number of tokens: seconds of each phase of the layers, of the
    device, of the whole step.
    """
    rng, engine, steps = np.random.default_rng(0), llm.engine, []
    for _ in range(1 if case.decodes else NUM_PROMPTS):
        # Long enough that all decode together for a while after the last prompt.
        num_out = NUM_DECODE + case.sequences * case.num_before // 512 if case.decodes else 1
        params = SamplingParams(temperature=0, max_tokens=num_out, ignore_eos=True)
        for number in range(case.sequences):
            length = case.num_before + (0 if case.decodes else case.num_new)
            prompt = rng.integers(100, 40_000, length).tolist()
            engine.add(Request(number=len(steps) * 1000 + number + 1, prompt_ids=prompt, params=params))
        while engine.has_work:
            begin = time.perf_counter()
            engine.step()
            steps.append(
                (
                    watch.num_tokens[-1],
                    time.perf_counter() - begin,
                    watch.device_seconds[-1],
                    watch.layer_seconds[-1],
                )
            )
    wanted = [step for step in steps if step[0] == case.num_tokens]
    if case.num_before and not case.decodes:  # chunks of one prompt: only the last ones
        wanted = wanted[case.num_before // case.num_new :: case.num_before // case.num_new + 1]
    assert wanted, f"no step of {case.num_tokens} tokens: {Counter(step[0] for step in steps)}"
    phases = np.median([step[3] for step in wanted], axis=0)
    return (
        phases,
        float(np.median([step[2] for step in wanted])),
        float(np.median([step[1] for step in wanted])),
    )


def _rows(
    case: Case,
    config: DecoderConfig,
    seconds: tuple[np.ndarray, float, float],
    limits: dict[str, float],
) -> list[Row]:
    phases, device, whole = seconds

    def product(outputs: int, inputs: int, rows: int, times: int) -> float:
        """Seconds at the limit: weights from memory, or products."""
        return times * outputs * inputs * max(2 / limits["read_gb_s"], 2 * rows / limits["gflop_s"]) / 1e9

    def attention() -> float:
        keys = case.num_new * (case.num_before + (case.num_new + 1) / 2)
        flop = 4 * case.sequences * keys * config.num_heads * config.head_dim
        read = 4 * case.sequences * (case.num_before + case.num_new) * config.num_kv_heads * config.head_dim
        return config.num_layers * max(flop / limits["gflop_s"], read / limits["read_gb_s"]) / 1e9

    hidden, middle, t, layers = (
        config.hidden_size,
        config.intermediate_size,
        case.num_tokens,
        config.num_layers,
    )
    heads = config.num_heads * config.head_dim
    allowed = {
        "qkv": product(heads + 2 * config.num_kv_heads * config.head_dim, hidden, t, layers),
        "attention": attention(),
        "out": product(hidden, heads, t, layers),
        "gate, up": product(2 * middle, hidden, t, layers),
        "down": product(hidden, middle, t, layers),
    }
    by_name: dict[str, float] = {}
    for name, value in zip(PHASES, phases, strict=True):
        by_name[name] = by_name.get(name, 0) + float(value)
    rows = [Row(name, value, allowed.get(name)) for name, value in by_name.items()]
    head = product(config.vocab_size, hidden, case.sequences, 1)
    rows.append(Row("embedding, head, sampling, interpreter", device - float(phases.sum()), head))
    rows.append(Row("host", whole - device, None))
    return [*rows, Row("whole step", whole, sum(allowed.values()) + head)]


SHARED = ((32, 512), (32, 1024), (16, 2048))  # sequences, and how many tokens they begin alike with


def measure_sharing(
    model: str, cache_dir: str, cases: Iterable[tuple[int, int]] = SHARED, num_steps: int = 60
) -> list[dict[str, float]]:
    """Steps of sequences with a common prefix, in turn with and without looking at its keys together."""
    llm = LLM(model, cache_dir=cache_dir, max_num_seqs=32, max_num_batched_tokens=512)
    layers, rng, found = llm.engine.runner.decoder.layers, np.random.default_rng(0), []
    for sequences, num_shared in cases:
        prefix = rng.integers(100, 40_000, num_shared).tolist()
        params = SamplingParams(temperature=0, max_tokens=sequences + num_steps + 20, ignore_eos=True)
        llm.generate([prefix], SamplingParams(max_tokens=1))
        for number in range(1, sequences + 1):
            prompt = prefix + rng.integers(100, 40_000, 32).tolist()
            llm.engine.add(Request(number=10**6 + number, prompt_ids=prompt, params=params))
        seconds: dict[bool, list[float]] = {True: [], False: []}
        while llm.engine.has_work:
            running = llm.engine.scheduler.running
            layers.may_share = not layers.may_share
            begin, is_decode = time.perf_counter(), len(running) == sequences
            is_decode = is_decode and all(one.num_computed >= one.num_prompt for one in running)
            llm.engine.step()
            if is_decode:
                seconds[layers.may_share].append(time.perf_counter() - begin)
        alone, together = (1e3 * float(np.median(seconds[which])) for which in (False, True))
        found.append(
            {
                "sequences": sequences,
                "shared tokens": num_shared,
                "alone ms": alone,
                "together ms": together,
                "ratio": alone / together,
            }
        )
    llm.close()
    return found


def table_of_sharing(found: list[dict[str, float]]) -> str:
    lines = ["| " + " | ".join(found[0]) + " |", "|" + " --- |" * len(found[0])]
    lines += ["| " + " | ".join(f"{value:.4g}" for value in row.values()) + " |" for row in found]
    return "\n".join(lines)


def table(measured: dict[str, list[Row]]) -> str:
    lines = []
    for case, rows in measured.items():
        whole = rows[-1].seconds
        lines += [f"| {case} | ms | of the step | of the limit |", "| --- | --- | --- | --- |"]
        for row in rows:
            reached = "" if row.limit is None else f"{100 * row.limit / row.seconds:.0f} %"
            lines.append(
                f"| {row.name} | {1e3 * row.seconds:.2f} | {100 * row.seconds / whole:.0f} % | {reached} |"
            )
        lines.append("")
    return "\n".join(lines)


def as_json(measured: dict[str, list[Row]]) -> dict[str, Any]:
    return {case: {row.name: [row.seconds, row.limit] for row in rows} for case, rows in measured.items()}
