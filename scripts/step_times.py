"""How long a step of the engine takes, as a function of what runs in it: measured, fitted, kept as JSON.

Called by scripts/benchmark.py --step-times; scripts/simulate.py reads what it writes.

A step's time is taken to be a sum: its own beginning, so much for each token (with other rates from 16 and
from 64 tokens on, where the weights' way from memory no longer hides the products), each token that is
sampled, each pair of a new token and a key that it looks at, of decoding sequences and of prompts. No part is
negative.
"""

from __future__ import annotations

import json
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pagetide.config import make_settings
from pagetide.engine.assemble import assemble
from pagetide.engine.engine import Engine
from pagetide.runner.plan import StepPlan
from pagetide.types import Request, SamplingParams

PARTS = ("step", "token", "token from 16", "token from 64", "sampled", "decoded key", "prompt key")
NUM_RUNNING = 32
NUM_BATCHED = 256
_SETTLED = 0.1  # of the steps, which warm up


def features(plan: StepPlan) -> list[float]:
    """[parts] how much of each part a step has."""
    tokens = plan.num_tokens
    decodes = plan.counts == 1
    seen = plan.counts * (plan.starts + (plan.counts + 1) / 2)
    return [
        1.0,
        float(tokens),
        float(max(0, tokens - 16)),
        float(max(0, tokens - 64)),
        float(plan.num_sampled),
        float(seen[decodes].sum()),
        float(seen[~decodes].sum()),
    ]


@dataclass(frozen=True)
class StepTimes:
    """seconds: of each part. settings: of the engine that was measured; error: mean relative error of the
    fit.
    """

    seconds: list[float]
    settings: dict[str, int]
    error: float = 0.0
    name: str = ""

    def of(self, plan: StepPlan) -> float:
        """Seconds that this step takes."""
        return float(np.dot(self.seconds, features(plan)))

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "seconds": dict(zip(PARTS, self.seconds, strict=True)),
            "settings": self.settings,
            "error": self.error,
        }

    @classmethod
    def read(cls, file: Path) -> StepTimes:
        """Raises ValueError if that is none of ours."""
        told = json.loads(file.read_text())
        told = told.get("step_times", told)
        if set(told.get("seconds", ())) != set(PARTS):
            raise ValueError(
                f"{file} has no step times; scripts/benchmark.py --step-times --json writes them"
            )
        seconds = [float(told["seconds"][part]) for part in PARTS]
        return cls(seconds, told["settings"], told["error"], told["name"])


def fit(rows: np.ndarray, times: np.ndarray) -> tuple[list[float], float]:
    """Seconds of each part, and the mean relative error: least squares of relative errors, without parts that
    would be negative. rows: [steps, parts]; times: [steps] seconds.
    """
    weighted, ones = rows / times[:, None], np.ones(len(times))
    scale = np.maximum(np.abs(weighted).max(axis=0), 1e-30)
    used = np.abs(rows).max(axis=0) > 0
    found = np.zeros(rows.shape[1])
    while used.any():
        found[:] = 0
        found[used] = np.linalg.lstsq(weighted[:, used] / scale[used], ones, rcond=None)[0] / scale[used]
        if (found >= 0).all():
            break
        used[np.argmin(found * scale)] = False
    error = float(np.mean(np.abs(rows @ found / times - 1)))
    return found.tolist(), error


class Recorder:
    """Stands before a runner and keeps each step's plan."""

    def __init__(self, engine: Engine):
        self.plan: StepPlan | None = None
        self._runner, self._forward = engine.runner, engine.runner.forward
        engine.runner.forward = self._note  # type: ignore[method-assign]

    def _note(self, plan: StepPlan) -> None:
        self.plan = plan
        self._forward(plan)

    def leave(self) -> None:
        self._runner.forward = self._forward  # type: ignore[method-assign]


def measure(model: str, cache: str, seconds: float) -> StepTimes:
    """An engine of its own, for so long."""
    settings = make_settings(
        model=model,
        cache_dir=cache,
        max_num_seqs=NUM_RUNNING,
        max_num_batched_tokens=NUM_BATCHED,
        kv_cache_gb=1.0,
    )
    engine = assemble(settings)
    found = measure_engine(engine, seconds)
    engine.close()
    return found


def measure_engine(engine: Engine, seconds: float) -> StepTimes:
    """Runs loads of all sizes."""
    recorder, rng = Recorder(engine), random.Random(0)
    rows: list[list[float]] = []
    times: list[float] = []
    begin, number = time.monotonic(), 10**9
    while time.monotonic() < begin + seconds:
        # So many run at once, with prompts of their own lengths.
        for _ in range(rng.choice([1, 1, 2, 4, 8, 16, 24, 32])):
            number += 1
            prompt = rng.choices(range(100, 10_000), k=rng.choice([8, 32, 64, 128, 256, 512]))
            asked = SamplingParams(max_tokens=rng.randint(8, 64), ignore_eos=True, temperature=0.0)
            engine.add(Request(number=number, prompt_ids=prompt, params=asked, stream=True))
        while engine.has_work:
            recorder.plan, start = None, time.perf_counter()
            engine.step()
            if recorder.plan is not None:
                rows.append(features(recorder.plan))
                times.append(time.perf_counter() - start)
    recorder.leave()
    skipped = int(_SETTLED * len(rows))
    found, error = fit(np.array(rows[skipped:]), np.array(times[skipped:]))
    facts = {
        "max_num_seqs": NUM_RUNNING,
        "max_num_batched_tokens": NUM_BATCHED,
        "num_blocks": engine.info.num_blocks,
        "block_size": engine.info.block_size,
        "max_model_len": engine.info.max_model_len,
    }
    return StepTimes(found, facts, error, Path(engine.info.model).name)


def table(found: StepTimes) -> str:
    lines = [f"{found.name}: mean error of the fit {found.error:.1%}", "| part | us |", "| --- | --- |"]
    lines += [f"| {part} | {1e6 * seconds:.3f} |" for part, seconds in zip(PARTS, found.seconds, strict=True)]
    return "\n".join(lines)
