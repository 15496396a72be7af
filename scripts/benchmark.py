"""Measures Pagetide on fixed workloads, alone and through Triton, beside transformers and the machine's
limits, all in one run.

   single  1 x (128 tokens in, 128 out)      mixed   64 x (16..512 in, 16..256 out), seeded
   batch  64 x (128, 128)                    prefix  64 x (512 shared + 32 own, 64)
   long    1 x (8,000, 128)                  poisson:RATE  mixed, so many requests a second at random
Greedy, exact lengths, all submitted at once, at most 32 running. Figures are output tokens a second,
engines in turn in one run.

python scripts/benchmark.py [--engine] [--server] [--features] [--quantized]
[--workloads single batch] [--repeats 2] [--json FILE] [--plot FILE]
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "backend_src"))
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "clients"))

import features
import host
import ops
import report
import speculation
import step_times
import streams
import way_out
from engines import CACHE, ENGINES, Figures, run_gateway, run_served, started_gateway, started_server
from limits import machine_limits, versions
from workloads import WORKLOADS, Job, workload

# By bits, so that each stands beside its peers.
QUANTIZED = (
    "pagetide",
    "pagetide w8a16",
    "pagetide w8a8",
    "openvino int8",
    "llamacpp Q8_0",
    "pagetide w4a16",
    "pagetide w4a8",
    "llamacpp Q4_1",
)
POISSON_SHARES = (0.6, 0.9)  # of our own capacity


def run_one(engine: str, names: Iterable[str], model: str, seed: int) -> None:
    """In a process of its own: prints a JSON line for each workload, and one with the seconds from the
    process' beginning to the first token of all (cold_s) and the peak memory of the process and its children.
    """
    seeds = itertools.count(seed * 1000)
    measured = ENGINES[engine](lambda name: workload(name, next(seeds)), names, model)
    _, warm_up = next(measured)
    cold = time.time() - psutil.Process().create_time() - warm_up.seconds + (warm_up.ttft_s or 0)
    for name, result in measured:
        print(json.dumps({"workload": name, **asdict(result)}), flush=True)
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(json.dumps({"peak_mb": peak / 1024, "cold_s": cold}), flush=True)


def measure(
    engine: str, names: list[str], model: str, seed: int
) -> tuple[dict[str, Figures], dict[str, float]]:
    """Figures by workload; peak_mb and cold_s."""
    command = [sys.executable, __file__, "--run-one", engine, "--model", model]
    command += ["--workloads", *names, "--seed", str(seed)]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    rows = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    found = {row.pop("workload"): Figures(**row) for row in rows if "workload" in row}
    return found, rows[-1]


def served_shares(names: list[str], model: str, repeats: int) -> dict[str, dict[str, list[dict[str, float]]]]:
    """By workload and way: tokens/s as a share of the engine alone, and time to first token in ms.

    Engine, server and gateway are all there and take turns, since a machine's speed changes over minutes;
    the idle ones take no time.
    """
    found: dict[str, dict[str, list[dict[str, float]]]] = {name: defaultdict(list) for name in names}
    command = [sys.executable, __file__, "--run-one", "pagetide", "--on-demand", "--model", model]
    seeds = itertools.count(500_000)
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as engine,
        started_server(model=model) as server,
        started_gateway(server) as gateway,
    ):

        def alone(name: str) -> float:
            assert engine.stdin is not None and engine.stdout is not None
            engine.stdin.write(f"{name}\n")
            engine.stdin.flush()
            line = next(line for line in engine.stdout if line.startswith("{"))
            return json.loads(line)["tokens_per_s"]

        ways: dict[str, Callable[[list[Job]], Figures]] = {
            "streams over gRPC": lambda jobs: run_served(server, jobs, stream=True),
            "whole answers over gRPC": lambda jobs: run_served(server, jobs, stream=False),
            "streams of the gateway": lambda jobs: run_gateway(gateway, jobs),
        }
        for name in names:
            alone(name)
            for _ in range(repeats):
                for way, run in ways.items():
                    before = alone(name)
                    figures = run(workload(name, next(seeds)))
                    share = 2 * figures.tokens_per_s / (before + alone(name))
                    found[name][way].append({"share": share, "ttft_ms": 1000 * (figures.ttft_s or 0)})
        assert engine.stdin is not None
        engine.stdin.close()
    return found


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--engine",
        action="store_true",
        help="the engine alone (the default, with transformers and static batching beside it)",
    )
    parser.add_argument(
        "--server",
        action="store_true",
        help="through Triton and the gateway too, taking turns with the engine alone",
    )
    parser.add_argument(
        "--features", action="store_true", help="what each feature of requests costs a step, and nothing else"
    )
    parser.add_argument(
        "--speculation", action="store_true", help="what guessing of tokens is worth, and nothing else"
    )
    parser.add_argument(
        "--streams",
        nargs="*",
        type=int,
        metavar="USERS",
        help="how streams flow for so many users (1 4 8 32), and nothing else",
    )
    parser.add_argument(
        "--chunks",
        nargs="?",
        type=int,
        const=8,
        metavar="USERS",
        help="what a chunk costs and where, and nothing else",
    )
    parser.add_argument(
        "--way-out",
        nargs="*",
        type=int,
        metavar="USERS",
        help="how many tokens Triton brings to so many users (1 32 256) if the engine computes nothing, "
        "and nothing else",
    )
    parser.add_argument(
        "--step-times",
        action="store_true",
        help="how long steps take by what runs in them, for scripts/simulate.py, and nothing else",
    )
    parser.add_argument(
        "--host", action="store_true", help="the host's time for each step, without a model, and nothing else"
    )
    parser.add_argument(
        "--ops",
        action="store_true",
        help="where a step's time goes, each op beside its limit, and nothing else",
    )
    parser.add_argument("--seconds", type=float, default=10, help="of each run of --streams and --chunks")
    parser.add_argument(
        "--against",
        nargs="+",
        choices=("openvino", "vllm", "llamacpp"),
        help="other engines (scripts/peers.sh installs them) in turn with ours",
    )
    parser.add_argument(
        "--quantized",
        action="store_true",
        help="each quantization in turn with full precision, and with what scripts/peers.sh has quantized",
    )
    parser.add_argument(
        "--only", nargs="+", choices=ENGINES, metavar="ENGINE", help=f"run just these: {', '.join(ENGINES)}"
    )
    parser.add_argument(
        "--poisson",
        action="store_true",
        help="the jobs of mixed arriving at random, at 60 %% and 90 %% of what Pagetide alone finishes",
    )
    parser.add_argument(
        "--workloads",
        nargs="+",
        metavar="NAME",
        default=list(WORKLOADS),
        help=f"{', '.join(WORKLOADS)} (the default: all), long, poisson:RATE",
    )
    parser.add_argument("--model", default="", help="a model directory; the embedded model if not given")
    parser.add_argument(
        "--repeats",
        type=int,
        default=1,
        help="rounds in which all engines take their turn; medians are shown",
    )
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--plot", type=Path, help="draw a plot into this file")
    parser.add_argument("--streams-alone", type=int, metavar="MAX_RUNNING", help=argparse.SUPPRESS)
    parser.add_argument("--run-one", help=argparse.SUPPRESS)
    parser.add_argument("--on-demand", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.model and (arguments.features or arguments.host or arguments.streams or arguments.chunks):
        parser.error("--features, --host, --streams and --chunks measure the embedded model")
    return arguments


def engines_of(arguments: argparse.Namespace) -> list[str]:
    if arguments.only:
        return arguments.only
    if arguments.quantized:
        return list(QUANTIZED)
    if arguments.against:
        return ["pagetide", *arguments.against] + ["transformers bfloat16"] * (not arguments.poisson)
    alone = [
        "pagetide",
        "pagetide, static batches, contiguous KV",
        "transformers bfloat16",
        "transformers float32",
    ]
    return [] if arguments.server and not arguments.engine else alone


def run_rounds(
    engines: list[str], names: list[str], model: str, repeats: int, may_fail: Iterable[str]
) -> tuple[dict[str, dict[str, list[Figures]]], dict[str, list[dict[str, float]]]]:
    """All engines in turn, so many times: figures by engine and workload, and what measure says of the
    processes.
    """
    results: dict[str, dict[str, list[Figures]]] = {}
    processes: dict[str, list[dict[str, float]]] = {}
    for repeat in range(repeats):
        for engine in engines:
            begin = time.perf_counter()
            print(f"round {repeat + 1} of {repeats}: {engine} ...", end=" ", file=sys.stderr, flush=True)
            try:
                found, process = measure(engine, names, model, repeat)
            except subprocess.CalledProcessError as error:
                if engine not in may_fail:
                    raise
                print(f"did not run ({error}); the others go on", file=sys.stderr)
                continue
            for name, result in found.items():
                results.setdefault(engine, {}).setdefault(name, []).append(result)
            processes.setdefault(engine, []).append(process)
            print(f"{time.perf_counter() - begin:.0f} s", file=sys.stderr)
    return results, processes


def poisson_names(model: str, seed: int) -> list[str]:
    """The workloads whose requests come at shares of what Pagetide alone finishes of `mixed`."""
    jobs = workload("mixed")
    found, _ = measure("pagetide", ["mixed"], model, seed)
    capacity = found["mixed"].tokens_per_s * len(jobs) / sum(job.num_tokens for job in jobs)
    return [f"poisson:{share * capacity:.2f}" for share in POISSON_SHARES]


def print_one(arguments: argparse.Namespace) -> bool:
    """What is measured by itself, if that was asked for: table, then a line of JSON."""
    found: dict[str, Any]
    if arguments.streams is not None:
        rows = streams.measure_beside_engine(arguments.streams or [1, 4, 8, 32], arguments.seconds)
        table, found = streams.table(rows), {"streams": streams.as_json(rows)}
    elif arguments.chunks is not None:
        ways = streams.measure_chunks(arguments.chunks, arguments.seconds)
        table = streams.cost_table(ways)
        found = {"chunks": {name: streams.as_json([row]) for name, row in ways.items()}}
    elif arguments.way_out is not None:
        ways_out = way_out.measure(arguments.way_out or [1, 32, 256], arguments.seconds)
        table, found = way_out.table(ways_out), {"way_out": way_out.as_json(ways_out)}
    elif arguments.step_times:
        fitted = step_times.measure(arguments.model, CACHE, 4 * arguments.seconds)
        table, found = step_times.table(fitted), {"step_times": fitted.as_json()}
    elif arguments.host:
        times = host.measure([32, 256])
        table, found = host.table(times), {"host_us": times}
    elif arguments.ops:
        limits = machine_limits(arguments.model)
        cases = ops.measure(
            arguments.model, CACHE, {"read_gb_s": limits["read_gb_s"], "gflop_s": limits["bfloat16_gflop_s"]}
        )
        sharing = ops.measure_sharing(arguments.model, CACHE)
        table = f"{ops.table(cases)}\n{ops.table_of_sharing(sharing)}"
        found = {"limits": limits, "ops": ops.as_json(cases), "sharing": sharing}
    elif arguments.features:
        costs = features.costs(max(arguments.repeats, 3))
        steps = {name: cost._asdict() for name, cost in costs.items()}
        table, found = features.table(costs), {"steps": steps}
    elif arguments.speculation:
        guessed = speculation.measure(max(arguments.repeats, 3))
        table, found = speculation.table(guessed), {"speculation": [asdict(case) for case in guessed]}
    else:
        return False
    print(table)
    summary = {"machine": versions(), **found}
    if arguments.json:
        arguments.json.write_text(json.dumps(summary, indent=1))
    print(json.dumps(summary))
    return True


def main() -> int:
    arguments = parse_arguments()
    if arguments.run_one:
        names = iter(lambda: sys.stdin.readline().strip(), "") if arguments.on_demand else arguments.workloads
        run_one(arguments.run_one, names, arguments.model, arguments.seed)
        return 0
    if arguments.streams_alone:
        streams.serve_alone(arguments.seconds, arguments.streams_alone)
        return 0
    if print_one(arguments):
        return 0
    names = poisson_names(arguments.model, arguments.repeats) if arguments.poisson else arguments.workloads
    engines = engines_of(arguments)
    may_fail = [engine for engine in engines if engine.startswith(("openvino", "vllm", "llamacpp"))]
    results, processes = run_rounds(engines, names, arguments.model, arguments.repeats, may_fail)
    limits = machine_limits(arguments.model)
    if arguments.poisson:
        print(report.arrivals(results, names))
    elif results:
        print(report.rates(results, processes, names, limits))
    shares = served_shares(names, arguments.model, max(arguments.repeats, 3)) if arguments.server else {}
    if shares:
        print(report.shares(shares))
    summary = {
        "machine": versions(),
        "limits": limits,
        "processes": processes,
        "served_shares": shares,
        "results": {
            engine: {name: [asdict(run) for run in runs] for name, runs in by_name.items()}
            for engine, by_name in results.items()
        },
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(summary, indent=1))
    if arguments.plot:
        report.draw(results, names, arguments.plot)
    print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
