"""How many replicas a traffic needs: the real scheduler and block manager of each, on a device that computes
nothing and takes the time that a measured one would.

   step times   scripts/benchmark.py --step-times --json FILE measures and fits them (scripts/step_times.py)
   arrivals     at random (--rate, requests a second), in bursts (--burst), or recorded (--trace FILE.csv with
                the columns arrival_s, prompt_tokens, answer_tokens, and if prompts share beginnings prefix,
                prefix_tokens)
   routing      round-robin, least-open, or prefix: the gateway's own (pagetide/gateway/routing.py)

python scripts/simulate.py STEP_TIMES.json --rate 8 --replicas 1 2 4 [--routing prefix] [--plot FILE.png]
python scripts/simulate.py STEP_TIMES.json --rate 8 --ttft 1 --tpot 0.1     how many replicas it takes
python scripts/simulate.py --check                                         against one and two real engines
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "backend_src"))

from simulation import MOST_REPLICAS, ROUTES, Outcome, needed, simulate
from step_times import StepTimes
from traffic import Arrival, Traffic, read_trace


def table(outcomes: list[Outcome]) -> str:
    lines = [
        "| replicas | routing | tokens/s | TTFT p50 / p90 / p99 s | TPOT p50 / p90 / p99 ms | cached | "
        "refused |",
        "| --- |" + " --- |" * 6,
    ]
    for one in outcomes:
        ttft = " / ".join(f"{value:.2f}" for value in one.ttft)
        tpot = " / ".join(f"{1000 * value:.0f}" for value in one.tpot)
        lines.append(
            f"| {one.replicas} | {one.routing} | {one.tokens_per_s:.0f} | {ttft} | {tpot} | "
            f"{one.hit_rate:.0%} | {one.refused} |"
        )
    return "\n".join(lines)


def draw(outcomes: list[Outcome], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, all_axes = plt.subplots(1, 2, figsize=(10, 4))
    for routing, group in itertools.groupby(sorted(outcomes, key=lambda o: o.routing), lambda o: o.routing):
        rows = sorted(group, key=lambda one: one.replicas)
        counts = [one.replicas for one in rows]
        all_axes[0].plot(counts, [one.ttft[2] for one in rows], marker="o", label=routing)
        all_axes[1].plot(counts, [1000 * one.tpot[2] for one in rows], marker="o", label=routing)
    for axes, name in zip(
        all_axes, ("time to first token, s (p99)", "time per token, ms (p99)"), strict=True
    ):
        axes.set(xlabel="replicas", ylabel=name, ylim=(0, None))
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step_times", type=Path, nargs="?", help="what benchmark.py --step-times has written")
    parser.add_argument("--rate", type=float, default=1.0, help="requests a second")
    parser.add_argument("--burst", type=float, default=1.0, help="times the rate in one of ten seconds")
    parser.add_argument("--seconds", type=float, default=120.0, help="of arrivals")
    parser.add_argument("--trace", type=Path, help="recorded arrivals in place of random ones")
    parser.add_argument("--prompt", type=int, nargs=2, default=(16, 512), help="tokens, from and to")
    parser.add_argument("--answer", type=int, nargs=2, default=(16, 256), help="tokens, from and to")
    parser.add_argument("--prefixes", type=int, default=0, help="so many beginnings are shared")
    parser.add_argument("--prefix-tokens", type=int, default=0, help="of each of them")
    parser.add_argument("--replicas", type=int, nargs="+", default=[], help="try these")
    parser.add_argument("--routing", nargs="+", choices=ROUTES, default=["least-open"])
    parser.add_argument("--ttft", type=float, default=1.0, help="limit in seconds")
    parser.add_argument("--tpot", type=float, default=0.1, help="limit in seconds")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--check", action="store_true", help="measure real engines, and compare")
    arguments = parser.parse_args()
    if arguments.check:
        import check_simulation

        return check_simulation.main(arguments.plot)
    if arguments.step_times is None:
        parser.error("step times are missing: the JSON file that benchmark.py --step-times has written")
    try:
        times = StepTimes.read(arguments.step_times)
        arrivals = read_trace(arguments.trace) if arguments.trace else traffic_of(arguments)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    outcomes = list(tried(times, arrivals, arguments))
    print(table(outcomes))
    if arguments.plot:
        draw(outcomes, arguments.plot)
    print(json.dumps([[one.replicas, one.routing, one.tokens_per_s, one.ttft, one.tpot] for one in outcomes]))
    return 0


def traffic_of(arguments: argparse.Namespace) -> list[Arrival]:
    prompt, answer = tuple(arguments.prompt), tuple(arguments.answer)
    traffic = Traffic(
        arguments.rate, arguments.burst, prompt, answer, arguments.prefixes, arguments.prefix_tokens
    )
    return traffic.arrivals(arguments.seconds)


def tried(times: StepTimes, arrivals: list[Arrival], arguments: argparse.Namespace) -> Iterator[Outcome]:
    for routing in arguments.routing:
        if arguments.replicas:
            for count in arguments.replicas:
                print(f"{count} replicas, {routing} ...", file=sys.stderr)
                yield simulate(times, arrivals, count, routing)
            continue
        found = needed(times, arrivals, routing, arguments.ttft, arguments.tpot)
        if found is None:
            print(f"{routing}: {MOST_REPLICAS} replicas do not keep the limits", file=sys.stderr)
        else:
            yield found


if __name__ == "__main__":
    sys.exit(main())
