"""Compares scripts/simulate.py with real engines: one that has all cores, and two that share them, each with
its half of the requests. Called by scripts/simulate.py --check.

Step times are measured in the same processes just before and just after, by all replicas at the same time:
a shared machine's speed changes meanwhile. Requests come at random, at shares of what the first measurement
says is the capacity.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "backend_src"))

import numpy as np
import psutil
from engines import CACHE
from lives import Life
from pagetide.config import make_settings
from pagetide.engine.assemble import assemble
from pagetide.engine.engine import Engine
from pagetide.types import Request, SamplingParams
from simulation import Outcome, outcome, simulate
from step_times import NUM_BATCHED, NUM_RUNNING, StepTimes, measure_engine
from traffic import Arrival, Traffic, prompt_ids

SHARES = (0.5, 0.8)
SECONDS = 60.0
FIT_S = 30.0
LENGTHS = {"prompt": (16, 256), "answer": (16, 128)}


class RealReplica:
    """An engine in a process of its own, on its own cores."""

    def __init__(self, number: int, cores: list[int]):
        command = [sys.executable, str(Path(__file__)), ",".join(map(str, cores)), str(number)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, **message: Any) -> None:
        assert self._process.stdin is not None
        print(json.dumps(message), file=self._process.stdin, flush=True)

    def answer(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def serve(cores: list[int], number: int) -> None:
    """A replica's process: `measure`, or `arrivals` from a time on."""
    psutil.Process().cpu_affinity(cores)
    engine = assemble(
        make_settings(
            cache_dir=CACHE,
            max_num_seqs=NUM_RUNNING,
            max_num_batched_tokens=NUM_BATCHED,
            num_threads=len(cores),
            kv_cache_gb=1.0,
        )
    )
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        message = json.loads(line)
        if "measure" in message:
            print(json.dumps(measure_engine(engine, message["measure"]).as_json()), flush=True)
        else:
            arrivals = {int(key): Arrival(**one) for key, one in message["arrivals"].items()}
            lives = run(engine, arrivals, message["begin"], number)
            print(json.dumps([asdict(life) for life in lives]), flush=True)


def run(engine: Engine, arrivals: dict[int, Arrival], begin: float, seed: int) -> list[Life]:
    """Times are those of the monotonic clock since begin."""
    lives: dict[int, Life] = {}
    waiting = sorted(arrivals.items(), key=lambda one: one[1].at)
    while waiting or engine.has_work:
        now = time.monotonic() - begin
        while waiting and waiting[0][1].at <= now:
            number, arrival = waiting.pop(0)
            lives[number] = Life(arrival.at)
            asked = SamplingParams(max_tokens=arrival.answer_tokens, ignore_eos=True, temperature=0.0)
            ids = prompt_ids(arrival, number + 10**6 * (seed + 1))
            engine.add(Request(number=number, prompt_ids=ids, params=asked, stream=True))
        if not engine.has_work:
            time.sleep(max(0.0, min(0.001, waiting[0][1].at - now)))
            continue
        outputs, _ = engine.step()
        now = time.monotonic() - begin
        for output in outputs:
            life = lives[output.number]
            life.take(len(output.ids), now)
            life.is_done = life.is_done or bool(output.finish_reason)
    return list(lives.values())


def capacity(times: StepTimes) -> float:
    """Requests a second that one replica ends when there are always enough of them."""
    arrivals = Traffic(1e6, **LENGTHS).arrivals(0.0005)
    found = simulate(times, arrivals, 1, "round-robin")
    return len(arrivals) * found.tokens_per_s / sum(one.answer_tokens for one in arrivals)


def compare(replicas: list[RealReplica], share: float) -> tuple[Outcome, Outcome]:
    """What was said to become of the requests, and what did."""
    before = fitted(replicas)
    arrivals = Traffic(share * len(replicas) * capacity(mean(before)), **LENGTHS).arrivals(SECONDS)
    begin = time.monotonic() + 1
    for number, replica in enumerate(replicas):
        own = {i: asdict(one) for i, one in enumerate(arrivals) if i % len(replicas) == number}
        replica.ask(arrivals=own, begin=begin)
    lives = [Life(**life) for replica in replicas for life in replica.answer()]
    predicted = simulate(mean(before + fitted(replicas)), arrivals, len(replicas), "round-robin")
    return predicted, outcome(lives, len(replicas), "real")


def fitted(replicas: list[RealReplica]) -> list[StepTimes]:
    for replica in replicas:
        replica.ask(measure=FIT_S)
    return [read(replica.answer()) for replica in replicas]


def mean(measured: list[StepTimes]) -> StepTimes:
    seconds = np.mean([one.seconds for one in measured], axis=0).tolist()
    return StepTimes(seconds, measured[0].settings, float(np.mean([one.error for one in measured])))


def read(told: dict[str, Any]) -> StepTimes:
    return StepTimes(list(told["seconds"].values()), told["settings"], told["error"], told["name"])


ROWS = {
    "tokens/s": lambda one: one.tokens_per_s,
    "TTFT mean, ms": lambda one: 1000 * float(np.mean([life.ttft for life in one.lives])),
    "TTFT p50, ms": lambda one: 1000 * one.ttft[0],
    "TTFT p90, ms": lambda one: 1000 * one.ttft[1],
    "TPOT mean, ms": lambda one: 1000 * float(np.mean([life.tpot for life in one.lives])),
    "TPOT p50, ms": lambda one: 1000 * one.tpot[0],
    "TPOT p90, ms": lambda one: 1000 * one.tpot[1],
}


def main(plot: Path | None) -> int:
    cores = psutil.Process().cpu_affinity()[:2]
    found: dict[tuple[int, float], tuple[Outcome, Outcome]] = {}
    for groups in ([cores], [[core] for core in cores]):
        replicas = [RealReplica(i, group) for i, group in enumerate(groups)]
        for replica in replicas:
            replica.answer()
        for share in SHARES:
            print(f"{len(groups)} replicas at {share:.0%} of the capacity ...", file=sys.stderr, flush=True)
            found[len(groups), share] = compare(replicas, share)
        for replica in replicas:
            replica.close()
    print("| said / measured (difference) | " + " | ".join(f"{n} at {s:.0%}" for n, s in found) + " |")
    print("| --- |" + " --- |" * len(found))
    for name, value in ROWS.items():
        pairs = [(value(said), value(measured)) for said, measured in found.values()]
        cells = [f"{said:.0f} / {measured:.0f} ({said / measured - 1:+.0%})" for said, measured in pairs]
        print(f"| {name} | " + " | ".join(cells) + " |")
    if plot:
        draw(found, plot)
    return 0


def draw(found: dict[tuple[int, float], tuple[Outcome, Outcome]], path: Path) -> None:
    """The distributions of times to first token and per token, said and measured."""
    import matplotlib.pyplot as plt

    figure, all_axes = plt.subplots(2, len(found), figsize=(3.2 * len(found), 5.5), squeeze=False)
    for column, ((count, share), outcomes) in enumerate(found.items()):
        for one, style, name in zip(outcomes, ("--", "-"), ("simulated", "measured"), strict=True):
            share_of = np.arange(1, len(one.lives) + 1) / len(one.lives)
            for row, values in enumerate(([x.ttft for x in one.lives], [x.tpot for x in one.lives])):
                all_axes[row][column].plot(1000 * np.sort(values), share_of, style, label=name)
        all_axes[0][column].set(title=f"{count} x at {share:.0%}", xlabel="time to first token, ms")
        all_axes[1][column].set(xlabel="time per token, ms")
    all_axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    serve([int(core) for core in sys.argv[1].split(",")], int(sys.argv[2]))
