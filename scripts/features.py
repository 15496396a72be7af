"""What each feature of requests costs a step of decoding sequences."""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import random_adapter
from engines import CACHE
from workloads import MAX_RUNNING, workload

FEATURES: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.8},
    "temperature, top_k 40": {"temperature": 0.8, "top_k": 40},
    "temperature, top_p 0.9": {"temperature": 0.8, "top_p": 0.9},
    "temperature, min_p 0.05": {"temperature": 0.8, "min_p": 0.05},
    "all penalties": {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.5},
    "logit_bias, 300 tokens": {"logit_bias": dict.fromkeys(range(300, 600), 1.0)},
    "bad_words": {"bad_words": ("the", "some words", "and")},
    "min_tokens": {"min_tokens": 1000, "ignore_eos": False},
    "allowed_token_ids": {"allowed_token_ids": tuple(range(100, 40_000))},
    "logprobs 5": {"logprobs": 5},
    "guided, a regular expression": {"guide": ("regex", "[a-zA-Z0-9 ,.]*")},
}
LORAS = [{"lora_name": str(number)} for number in range(4)]
RANK = 16


class Costs(NamedTuple):
    """Of steps of 32 decoding sequences, for each turn: their time as a ratio to that of plain greedy ones
    just before, and the part of it that sampling takes.
    """

    ratios: list[float]
    shares: list[float]


class WatchedSampler:
    """A Sampler that notes how long it takes."""

    def __init__(self, inner: Callable[..., Any]):
        self._inner = inner
        self.seconds = 0.0

    def __call__(self, *arguments: Any) -> Any:
        begin = time.perf_counter()
        result = self._inner(*arguments)
        self.seconds = time.perf_counter() - begin
        return result


def costs(repeats: int) -> dict[str, Costs]:
    """All sequences with one feature, and each with another."""
    with tempfile.TemporaryDirectory() as folder:
        for lora in LORAS:
            random_adapter.write(Path(folder) / lora["lora_name"], "", RANK)
        return _costs(repeats, folder)


def _costs(repeats: int, lora_dir: str) -> dict[str, Costs]:
    from pagetide.llm import LLM
    from pagetide.types import Guide, Request, SamplingParams

    llm = LLM(cache_dir=CACHE, max_num_seqs=MAX_RUNNING, lora_dir=lora_dir, max_loras=len(LORAS))
    engine, numbers, seeds = llm.engine, itertools.count(), itertools.count(900_000)
    runner: Any = engine.runner
    sampler = runner._sampler = WatchedSampler(runner._sampler)

    def params(values: dict[str, Any]) -> SamplingParams:
        given = {"temperature": 0, "max_tokens": 40, "ignore_eos": True, "seed": 1, **values}
        given.pop("lora_name", None)
        return SamplingParams(**given | ({"guide": Guide(*given["guide"])} if "guide" in given else {}))

    def step_seconds(rules: list[dict[str, Any]]) -> tuple[float, float]:
        """Of a step, and of sampling in it."""
        for job, rule in zip(workload("batch", next(seeds))[:MAX_RUNNING], rules, strict=True):
            name = rule.get("lora_name", "")
            engine.add(
                Request(number=next(numbers), prompt_ids=job.prompt, params=params(rule), lora_name=name)
            )
        times = []
        while engine.has_work:
            gauges = engine.statistics().gauges
            decodes = gauges["running"] == MAX_RUNNING and not gauges["waiting"]
            begin = time.perf_counter()
            engine.step()
            if decodes:
                times.append((time.perf_counter() - begin, sampler.seconds))
        whole, sampling = zip(*times[2:], strict=True)
        return statistics.median(whole), statistics.median(sampling)

    mixed = list(itertools.islice(itertools.cycle(FEATURES.values()), MAX_RUNNING))
    batches = {"each request another one": mixed} | {
        name: [rule] * MAX_RUNNING for name, rule in FEATURES.items()
    }
    batches[f"a LoRA adapter of rank {RANK} on all matrices"] = LORAS[:1] * MAX_RUNNING
    batches[f"{len(LORAS)} such adapters"] = list(itertools.islice(itertools.cycle(LORAS), MAX_RUNNING))
    step_seconds(mixed)  # compiles kernels and grammars
    found = {name: Costs([], []) for name in ["none: greedy", *batches]}
    for _ in range(repeats):
        for name, rules in batches.items():
            plain, greedy = step_seconds([{}] * MAX_RUNNING)
            whole, sampling = step_seconds(rules)
            found["none: greedy"].ratios.append(1.0)
            found["none: greedy"].shares.append(greedy / plain)
            found[name].ratios.append(whole / plain)
            found[name].shares.append(sampling / whole)
    return found


def table(found: dict[str, Costs]) -> str:
    """Medians of the turns."""
    lines = [
        f"| {MAX_RUNNING} sequences, decoding | time of a step against plain greedy | of it sampling |",
        "| --- | --- | --- |",
    ]
    lines += [
        f"| {name} | {statistics.median(costs.ratios) - 1:+.0%} | {statistics.median(costs.shares):.1%} |"
        for name, costs in found.items()
    ]
    return "\n".join(lines)
