"""Goodput of the engine under more requests than it can serve: with and without a limit to the queue.

Requests come at random (Poisson) at multiples of the capacity, which is measured first. Good is a request
whose first token comes within --ttft seconds, and whose others follow each within --tpot; refused ones do not
come back. Both engines take turns at each rate.

python scripts/overload.py [--seconds 30] [--rates 0.5 0.8 1 1.5 2 3] [--plot scripts/overload.png]
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "backend_src"))

from lives import Life
from pagetide.config import make_settings
from pagetide.engine.assemble import assemble
from pagetide.engine.engine import Engine
from pagetide.types import QueueFullError, Request, SamplingParams

CACHE = str(Path(__file__).resolve().parents[1] / ".cache")
NUM_RUNNING = 16
PROMPT, ANSWER = (20, 100), (16, 64)  # tokens, from and to
WARM_UP_S, CAPACITY_S = 5.0, 20.0


class Run:
    """One engine that is given requests and watched."""

    def __init__(self, engine: Engine, seed: int):
        self._engine, self._rng = engine, random.Random(seed)
        self.lives: dict[int, Life] = {}
        self.num_refused = 0

    def add(self, arrived: float) -> None:
        number = len(self.lives) + self.num_refused + 1
        prompt = self._rng.choices(range(100, 40_000), k=self._rng.randint(*PROMPT))
        params = SamplingParams(max_tokens=self._rng.randint(*ANSWER), ignore_eos=True, temperature=0.0)
        try:
            self._engine.add(Request(number=number, prompt_ids=prompt, params=params, stream=True))
            self.lives[number] = Life(arrived)
        except QueueFullError:
            self.num_refused += 1

    def step(self) -> None:
        outputs, refusals = self._engine.step()
        now = time.monotonic()
        for output in outputs:
            life = self.lives[output.number]
            life.take(len(output.ids), now)
            life.is_done = bool(output.finish_reason)
        self.num_refused += len(refusals)

    @property
    def has_work(self) -> bool:
        return self._engine.has_work

    def finish(self) -> None:
        """Gives up what has not ended."""
        self._engine.cancel(list(self.lives))
        while self._engine.has_work:
            self._engine.step()


def capacity(engine: Engine) -> float:
    """Requests a second with always enough of them, when all is warm."""
    run, begin = Run(engine, 0), time.monotonic() + WARM_UP_S
    while time.monotonic() < begin + CAPACITY_S:
        while sum(not life.is_done for life in run.lives.values()) < 2 * NUM_RUNNING:
            run.add(time.monotonic())
        run.step()
    done = sum(life.is_done and life.last > begin for life in run.lives.values())
    run.finish()
    return done / CAPACITY_S


def measure(engine: Engine, rate: float, seconds: float) -> Run:
    """Arrivals for so many seconds, and what comes of them in the time that a good answer may take."""
    run, rng = Run(engine, 1), random.Random(2)
    begin = time.monotonic()
    arrival = begin + rng.expovariate(rate)
    while time.monotonic() < begin + seconds:
        while arrival <= time.monotonic():
            run.add(arrival)
            arrival += rng.expovariate(rate)
        if run.has_work:
            run.step()
        else:
            time.sleep(max(0.0, min(0.001, arrival - time.monotonic())))
    while run.has_work and time.monotonic() < begin + seconds + 10:
        run.step()
    run.finish()
    return run


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="overload.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.5, 0.8, 1.0, 1.5, 2.0, 3.0])
    parser.add_argument("--ttft", type=float, default=2.0)
    parser.add_argument("--tpot", type=float, default=0.2)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    limits = {"first come, first served": 0.0, "queue of half the TTFT": arguments.ttft / 2}
    engines = {
        name: assemble(
            make_settings(cache_dir=CACHE, max_num_seqs=NUM_RUNNING, max_queue_s=limit, kv_cache_gb=0.5)
        )
        for name, limit in limits.items()
    }
    most = capacity(next(iter(engines.values())))
    print(f"capacity: {most:.1f} requests/s; good: TTFT {arguments.ttft:g} s, TPOT {arguments.tpot:g} s")
    print("| load | " + " | ".join(f"{name}: good/s, refused" for name in engines) + " |")
    print("| --- |" + " --- |" * len(engines))
    found: dict[str, list[float]] = {name: [] for name in engines}
    for rate in arguments.rates:
        cells = []
        for name, engine in engines.items():
            run = measure(engine, rate * most, arguments.seconds)
            good = sum(life.is_good(arguments.ttft, arguments.tpot) for life in run.lives.values())
            found[name].append(good / arguments.seconds)
            share = run.num_refused / max(1, run.num_refused + sum(x.is_done for x in run.lives.values()))
            cells.append(f"{found[name][-1]:.1f}, {share:.0%}")
        print(f"| {rate:g} | " + " | ".join(cells) + " |", flush=True)
    for name, values in found.items():
        print(f"{name}: at the highest load {values[-1] / max(values):.0%} of its best")
    if arguments.plot:
        draw(arguments.plot, arguments.rates, most, found)
    return 0


def draw(path: Path, rates: list[float], most: float, found: dict[str, list[float]]) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for name, values in found.items():
        axes.plot(rates, values, marker="o", label=name)
    axes.plot(rates, [min(rate, 1) * most for rate in rates], "--", color="grey", label="all that can be")
    axes.set(xlabel="load (share of the capacity)", ylabel="good requests a second", ylim=(0, None))
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
