"""What the benchmarks ask of every engine: prompts of token ids, numbers of tokens, times of arrival."""

from __future__ import annotations

import random
from dataclasses import dataclass

MAX_RUNNING = 32


@dataclass(frozen=True)
class Job:
    """One prompt of token ids, how many tokens to generate, and when it comes: seconds after the first."""

    prompt: list[int]
    num_tokens: int
    at: float = 0.0


def workload(name: str, seed: int = 0) -> list[Job]:
    """The jobs of a workload; another seed gives other tokens of the same lengths, so that no run finds
    another's prefix. poisson:RATE is mixed with so many requests a second arriving at random.
    """
    lengths, tokens, arrivals = random.Random(7), random.Random(f"{name}{seed}"), random.Random(11)

    def ids(count: int) -> list[int]:
        return tokens.choices(range(100, 40_000), k=count)

    if name == "single":
        return [Job(ids(128), 128)]
    if name == "batch":
        return [Job(ids(128), 128) for _ in range(64)]
    if name == "mixed":
        return [Job(ids(lengths.randint(16, 512)), lengths.randint(16, 256)) for _ in range(64)]
    if name == "prefix":
        shared = ids(512)
        return [Job(shared + ids(32), 64) for _ in range(64)]
    if name == "long":
        return [Job(ids(8000), 128)]
    kind, _, rate = name.partition(":")
    if kind != "poisson":
        raise ValueError(f"unknown workload {name}; known are {', '.join(WORKLOADS)}, long and poisson:RATE")
    at, jobs = 0.0, []
    for job in workload("mixed", seed):
        jobs.append(Job(job.prompt, job.num_tokens, at))
        at += arrivals.expovariate(float(rate))
    return jobs


WORKLOADS = ("single", "batch", "mixed", "prefix")
