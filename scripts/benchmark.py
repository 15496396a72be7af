"""Measures Pagetide on fixed workloads, alone and through Triton, beside transformers and the machine's
limits, all in one run.

   single  1 x (128 tokens in, 128 out)      mixed   64 x (16..512 in, 16..256 out), seeded
   batch  64 x (128, 128)                    prefix  64 x (512 shared + 32 own, 64)
Greedy, exact lengths, all submitted at once, at most 32 running. Figures are output tokens a second,
engines in turn in one run.

python scripts/benchmark.py [--engine] [--server] [--features] [--workloads single batch] [--repeats 2]
[--json FILE] [--plot FILE]
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import random
import re
import resource
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "backend_src"))
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "clients"))

import host
import ops
import streams
from triton_server import ROOT, TritonServer, free_address

CACHE = str(ROOT / ".cache")
MAX_RUNNING = 32


@dataclass(frozen=True)
class Job:
    """One prompt of token ids, and how many tokens to generate."""

    prompt: list[int]
    num_tokens: int


@dataclass
class Figures:
    """What a run of one workload gives. Times in seconds; ttft and tpot are medians over its requests."""

    tokens_per_s: float
    ttft_s: float | None = None
    tpot_s: float | None = None


def workload(name: str, seed: int = 0) -> list[Job]:
    """The jobs of a workload; another seed gives other tokens of the same lengths, so that no run finds
    another's prefix.
    """
    lengths, tokens = random.Random(7), random.Random(f"{name}{seed}")

    def ids(count: int) -> list[int]:
        return tokens.choices(range(100, 40_000), k=count)

    if name == "single":
        return [Job(ids(128), 128)]
    if name == "batch":
        return [Job(ids(128), 128) for _ in range(64)]
    if name == "mixed":
        return [Job(ids(lengths.randint(16, 512)), lengths.randint(16, 256)) for _ in range(64)]
    shared = ids(512)
    return [Job(shared + ids(32), 64) for _ in range(64)]


WORKLOADS = ("single", "batch", "mixed", "prefix")


# -- engines: each runs all workloads in a process of its own ----------------------------------------------


def run_pagetide(
    jobs_of: Callable[[str], list[Job]], names: Iterable[str], **settings: Any
) -> Iterator[tuple[str, Figures]]:
    """The engine without a server."""
    from pagetide.llm import LLM
    from pagetide.types import Request, SamplingParams

    llm = LLM(cache_dir=CACHE, max_num_seqs=MAX_RUNNING, **settings)
    engine, numbers = llm.engine, iter(range(10**9))
    for name in itertools.chain(["single"], names):  # the first one warms up
        first, last, counts = {}, {}, {}
        begin = time.perf_counter()
        for job in jobs_of(name):
            params = SamplingParams(temperature=0, max_tokens=job.num_tokens, ignore_eos=True)
            engine.add(Request(number=next(numbers), prompt_ids=job.prompt, params=params, stream=True))
        while engine.has_work:
            for output in engine.step().outputs:
                now = time.perf_counter() - begin
                first.setdefault(output.number, now)
                last[output.number] = now
                counts[output.number] = counts.get(output.number, 0) + len(output.ids)
        yield name, figures(time.perf_counter() - begin, first, last, counts)


def run_transformers(
    jobs_of: Callable[[str], list[Job]], names: list[str], dtype: str
) -> Iterator[tuple[str, Figures]]:
    """transformers' generate in static batches of 32: each batch runs until its longest answer is there."""
    import torch
    from pagetide.models.source import find_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        str(find_model("", Path(CACHE))), dtype=getattr(torch, dtype)
    ).eval()

    def generate(batch: list[Job]) -> None:
        longest, new = max(len(job.prompt) for job in batch), max(job.num_tokens for job in batch)
        ids = torch.tensor([[0] * (longest - len(job.prompt)) + job.prompt for job in batch])
        mask = torch.tensor([[0] * (longest - len(job.prompt)) + [1] * len(job.prompt) for job in batch])
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=new,
                min_new_tokens=new,
                pad_token_id=0,
            )
        assert out.shape[1] == longest + new

    for name in ["single", *names]:
        jobs = jobs_of(name)
        first = None
        if name == "single":
            begin = time.perf_counter()
            generate([Job(jobs[0].prompt, 1)])
            first = time.perf_counter() - begin
        begin = time.perf_counter()
        for at in range(0, len(jobs), MAX_RUNNING):
            generate(jobs[at : at + MAX_RUNNING])
        seconds = time.perf_counter() - begin
        count = sum(job.num_tokens for job in jobs)
        tpot = (seconds - first) / (count - 1) if first else None
        yield name, Figures(count / seconds, first, tpot)


def run_server(
    jobs_of: Callable[[str], list[Job]], names: list[str], stream: bool
) -> Iterator[tuple[str, Figures]]:
    """Through Triton's ensemble over gRPC."""
    with started_server() as server:
        for name in ["single", *names]:
            yield name, run_served(server, jobs_of(name), stream)


@contextmanager
def started_server(max_running: int = MAX_RUNNING) -> Iterator[TritonServer]:
    server = TritonServer(free_address(), {"cache_dir": CACHE, "max_num_seqs": max_running})
    server.start()
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()


def run_served(server: TritonServer, jobs: list[Job], stream: bool) -> Figures:
    """All requests at once on one connection."""
    import tritonclient.grpc as grpc

    answers = Answers(len(jobs))
    with grpc.InferenceServerClient(server.address.grpc) as client:
        client.start_stream(answers.receive)
        for number, job in enumerate(jobs):
            client.async_stream_infer("ensemble", request_inputs(job, stream), request_id=str(number))
        seconds = answers.wait()
    assert sum(answers.counts.values()) == sum(job.num_tokens for job in jobs)
    return figures(seconds, answers.first if stream else {}, answers.last, answers.counts)


def request_inputs(job: Job, stream: bool) -> list[Any]:
    import numpy as np
    import tritonclient.grpc as grpc

    def tensor(name: str, array: np.ndarray, kind: str) -> grpc.InferInput:
        result = grpc.InferInput(name, array.shape, kind)
        result.set_data_from_numpy(array)
        return result

    return [
        tensor("input_ids", np.array([job.prompt], np.int32), "INT32"),
        tensor("max_tokens", np.array([[job.num_tokens]], np.int32), "INT32"),
        tensor("temperature", np.array([[0]], np.float32), "FP32"),
        tensor("ignore_eos", np.array([[True]]), "BOOL"),
        tensor("stream", np.array([[stream]]), "BOOL"),
    ]


class Answers:
    """Times and counts of what comes back on a gRPC stream."""

    def __init__(self, num_requests: int):
        self.first: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        self._num_open = num_requests
        self._error = ""
        self._done = threading.Event()
        self._begin = time.perf_counter()

    def receive(self, result: Any, error: Any) -> None:
        if error is not None:
            self._error = str(error)
            self._done.set()
            return
        now, number = time.perf_counter() - self._begin, result.get_response().id
        self.first.setdefault(number, now)
        self.last[number] = now
        self.counts[number] = self.counts.get(number, 0) + int(result.as_numpy("sequence_length")[0, 0])
        self._num_open -= bool(result.as_numpy("finish_reason")[0])
        if not self._num_open:
            self._done.set()

    def wait(self) -> float:
        """Seconds until the last answer was whole."""
        if not self._done.wait(900) or self._error:
            raise RuntimeError(self._error or "no answer within 900 s")
        return time.perf_counter() - self._begin


def figures(
    seconds: float, first: dict[Any, float], last: dict[Any, float], counts: dict[Any, int]
) -> Figures:
    rates = [(last[n] - first[n]) / (counts[n] - 1) for n in first if counts[n] > 1]
    ttft = statistics.median(first.values()) if first else None
    return Figures(sum(counts.values()) / seconds, ttft, statistics.median(rates) if rates else None)


PEERS = ROOT / ".peers"  # where scripts/peers.sh installs other engines


def run_peer(
    jobs_of: Callable[[str], list[Job]], names: list[str], peer: str
) -> Iterator[tuple[str, Figures]]:
    """Another engine, in the environment that scripts/peers.sh has made for it."""
    command = [
        str(PEERS / peer / "bin" / "python"),
        str(ROOT / "scripts" / "peer_engines.py"),
        peer,
        str(PEERS),
        "bfloat16",
    ]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        for name in ["single", *names]:
            print(
                json.dumps([asdict(job) | {"at": 0.0} for job in jobs_of(name)]),
                file=process.stdin,
                flush=True,
            )
            result = json.loads(process.stdout.readline())
            first, last, counts = (dict(enumerate(result[key])) for key in ("first", "last", "counts"))
            yield name, figures(result["seconds"], first, last, counts)
        process.stdin.close()


ENGINES: dict[str, Callable[..., Iterator[tuple[str, Figures]]]] = {
    "pagetide": run_pagetide,
    "pagetide, static batches, contiguous KV": lambda jobs, names: run_pagetide(
        jobs, names, batching="static", kv_reservation="contiguous"
    ),
    "pagetide float32": lambda jobs, names: run_pagetide(jobs, names, dtype="float32"),
    "transformers bfloat16": lambda jobs, names: run_transformers(jobs, names, "bfloat16"),
    "transformers float32": lambda jobs, names: run_transformers(jobs, names, "float32"),
    "openvino": lambda jobs, names: run_peer(jobs, list(names), "openvino"),
    "vllm": lambda jobs, names: run_peer(jobs, list(names), "vllm"),
    "llamacpp": lambda jobs, names: run_peer(jobs, list(names), "llamacpp"),
    "pagetide through Triton, streams": lambda jobs, names: run_server(jobs, names, stream=True),
    "pagetide through Triton, whole answers": lambda jobs, names: run_server(jobs, names, stream=False),
}


# -- how streams flow --------------------------------------------------------------------------------------


def run_streams_alone(seconds: float, max_running: int) -> None:
    """Answers each number of users on standard input with the engine's own tokens a second."""
    from pagetide.llm import LLM

    llm = LLM(cache_dir=CACHE, max_num_seqs=max_running)
    for line in sys.stdin:
        print(json.dumps(streams.engine_alone(int(line), seconds, llm)), flush=True)


def measure_streams(users: list[int], seconds: float) -> list[streams.StreamFigures]:
    """Engine alone and server take turns for each number of users."""
    max_running = max(MAX_RUNNING, *users)  # every user streams
    alone_options = ["--streams-alone", str(max_running), "--seconds", str(seconds)]
    command = [sys.executable, __file__, *alone_options]
    alone = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert alone.stdin is not None and alone.stdout is not None
    rows = []
    with started_server(max_running) as server:
        for count in users:
            print(f"{count} users ...", file=sys.stderr, flush=True)
            row = streams.measure(
                server, count, seconds, lambda: metric_of(server, "pagetide_step_tokens_count")
            )
            print(count, file=alone.stdin, flush=True)
            row.engine_tokens_per_s = json.loads(alone.stdout.readline())
            rows.append(row)
    alone.stdin.close()
    alone.wait()
    return rows


def measure_chunks(users: int, seconds: float) -> dict[str, streams.StreamFigures]:
    """What a chunk costs, and where, by what its client asks for."""
    with started_server() as server:
        return {
            name: streams.measure(
                server, users, seconds, lambda: metric_of(server, "pagetide_step_tokens_count"), outputs
            )
            for name, outputs in streams.WAYS.items()
        }


def metric_of(server: TritonServer, name: str) -> float:
    with urllib.request.urlopen(f"http://{server.address.metrics}/metrics", timeout=10) as answer:
        found = re.search(rf"^{name}{{.*}} (\S+)$", answer.read().decode(), re.MULTILINE)
    assert found is not None, name
    return float(found[1])


# -- what features cost ------------------------------------------------------------------------------------

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


def feature_costs(repeats: int) -> dict[str, list[float]]:
    """Time per step of 32 decoding sequences, as a ratio to plain greedy ones just before: all with one
    feature, and each with another.
    """
    from pagetide.llm import LLM
    from pagetide.types import Guide, Request, SamplingParams

    llm = LLM(cache_dir=CACHE, max_num_seqs=MAX_RUNNING)
    engine, numbers, seeds = llm.engine, itertools.count(), itertools.count(900_000)

    def params(values: dict[str, Any]) -> SamplingParams:
        given = {"temperature": 0, "max_tokens": 40, "ignore_eos": True, "seed": 1, **values}
        return SamplingParams(**given | ({"guide": Guide(*given["guide"])} if "guide" in given else {}))

    def step_seconds(rules: list[dict[str, Any]]) -> float:
        for job, rule in zip(workload("batch", next(seeds))[:MAX_RUNNING], rules, strict=True):
            engine.add(Request(number=next(numbers), prompt_ids=job.prompt, params=params(rule)))
        times = []
        while engine.has_work:
            gauges = engine.statistics().gauges
            decodes = gauges["running"] == MAX_RUNNING and not gauges["waiting"]
            begin = time.perf_counter()
            engine.step()
            if decodes:
                times.append(time.perf_counter() - begin)
        return statistics.median(times[2:])

    mixed = list(itertools.islice(itertools.cycle(FEATURES.values()), MAX_RUNNING))
    batches = {"each request another one": mixed} | {
        name: [rule] * MAX_RUNNING for name, rule in FEATURES.items()
    }
    step_seconds(mixed)  # compiles kernels and grammars
    ratios: dict[str, list[float]] = {name: [] for name in batches}
    for _ in range(repeats):
        for name, rules in batches.items():
            plain = step_seconds([{}] * MAX_RUNNING)
            ratios[name].append(step_seconds(rules) / plain)
    return ratios


def report_costs(ratios: dict[str, list[float]]) -> str:
    lines = [f"| {MAX_RUNNING} sequences, decoding | time of a step against plain greedy |", "| --- | --- |"]
    lines += [f"| {name} | {statistics.median(values) - 1:+.0%} |" for name, values in ratios.items()]
    return "\n".join(lines)


# -- limits of the machine ---------------------------------------------------------------------------------


def machine_limits() -> dict[str, float]:
    """What memory and matrix products allow: read bandwidth in GB/s, products in GFLOP/s (bfloat16 and
    float32), weights of a step in MB.
    """
    import numba
    import numpy as np
    import torch
    from pagetide.models.families import read_model
    from pagetide.models.source import find_model

    @numba.njit(parallel=True, fastmath=True)
    def read(array: np.ndarray) -> float:
        total = 0.0
        for i in numba.prange(array.shape[0]):
            total += array[i]
        return total

    def best(function: Callable[[], Any], seconds: float = 1.5) -> float:
        function()
        times, end = [], time.perf_counter() + seconds
        while time.perf_counter() < end:
            begin = time.perf_counter()
            function()
            times.append(time.perf_counter() - begin)
        return min(times)

    array = np.ones(2**27, np.float32)
    limits = {"read_gb_s": array.nbytes / best(lambda: read(array)) / 1e9}
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        a, b = torch.randn(512, 1024).to(dtype), torch.randn(4096, 1024).to(dtype)
        limits[f"{name}_gflop_s"] = (
            2 * 512 * 1024 * 4096 / best(lambda a=a, b=b: torch.nn.functional.linear(a, b)) / 1e9
        )
    _, config = read_model(find_model("", Path(CACHE)))
    heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim * config.hidden_size
    layer = heads + 3 * config.hidden_size * config.intermediate_size
    limits["weights_mb"] = 2 * (config.num_layers * layer + config.vocab_size * config.hidden_size) / 1e6
    limits["max_single_tokens_s"] = limits["read_gb_s"] * 1e3 / limits["weights_mb"]
    return limits


# -- the run -----------------------------------------------------------------------------------------------


def run_one(engine: str, names: Iterable[str], seed: int) -> None:
    """In a process of its own: prints a JSON line for each workload, and the peak memory of the process and
    its children.
    """
    measured = ENGINES[engine](lambda name: workload(name, next(seeds)), names)
    seeds = iter(range(seed * 1000, seed * 1000 + 1000))
    next(measured)
    for name, result in measured:
        print(json.dumps({"workload": name, **asdict(result)}), flush=True)
    peak = (
        max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        / 1024
    )
    print(json.dumps({"peak_mb": peak}), flush=True)


def measure(engine: str, names: list[str], seed: int) -> tuple[dict[str, Figures], float]:
    command = [sys.executable, __file__, "--run-one", engine, "--workloads", *names, "--seed", str(seed)]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    rows = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    found = {row.pop("workload"): Figures(**row) for row in rows if "workload" in row}
    return found, rows[-1]["peak_mb"]


def served_shares(names: list[str], repeats: int) -> dict[str, dict[str, list[float]]]:
    """Tokens/s through Triton as shares of the engine alone, by workload and kind of answer.

    Engine and server are both there and take turns, since a machine's speed changes over minutes; the idle
    one takes no time.
    """
    shares: dict[str, dict[str, list[float]]] = {name: {"streams": [], "whole answers": []} for name in names}
    command = [sys.executable, __file__, "--run-one", "pagetide", "--on-demand"]
    seeds = itertools.count(500_000)
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as engine,
        started_server() as server,
    ):

        def alone(name: str) -> float:
            assert engine.stdin is not None and engine.stdout is not None
            engine.stdin.write(f"{name}\n")
            engine.stdin.flush()
            line = next(line for line in engine.stdout if line.startswith("{"))
            return json.loads(line)["tokens_per_s"]

        for name in names:
            alone(name)
            for _ in range(repeats):
                for kind, found in shares[name].items():
                    before = alone(name)
                    served = run_served(
                        server, workload(name, next(seeds)), stream=kind == "streams"
                    ).tokens_per_s
                    found.append(2 * served / (before + alone(name)))
        assert engine.stdin is not None
        engine.stdin.close()
    return shares


def report_shares(shares: dict[str, dict[str, list[float]]]) -> str:
    lines = [
        "| through Triton, share of the engine alone | " + " | ".join(shares) + " |",
        "|" + " --- |" * (len(shares) + 1),
    ]
    for kind in ("streams", "whole answers"):
        lines.append(
            f"| {kind} | "
            + " | ".join(f"{statistics.median(by_kind[kind]):.0%}" for by_kind in shares.values())
            + " |"
        )
    return "\n".join(lines)


def report(
    results: dict[str, dict[str, list[Figures]]],
    peaks: dict[str, float],
    names: list[str],
    limits: dict[str, float],
) -> str:
    """A table: tokens/s by engine and workload, in brackets the ratio to the faster transformers."""
    base = {
        name: max(
            (
                median_rate(runs[name])
                for engine, runs in results.items()
                if engine.startswith("transformers")
            ),
            default=None,
        )
        for name in names
    }
    header = ["engine", *names, "TTFT ms", "TPOT ms", "peak MB"]
    lines = [f"| {' | '.join(header)} |", "|" + " --- |" * len(header)]
    for engine, runs in results.items():
        cells = [engine]
        for name in names:
            rate = median_rate(runs[name])
            cells.append(f"{rate:.0f}" + (f" ({rate / base[name]:.1f}x)" if base[name] else ""))
        shown = runs["single" if "single" in names else names[0]]
        for attribute in ("ttft_s", "tpot_s"):
            values = [v for figure in shown if (v := getattr(figure, attribute)) is not None]
            cells.append(f"{1000 * statistics.median(values):.1f}" if values else "-")
        lines.append(f"| {' | '.join([*cells, f'{peaks[engine]:.0f}'])} |")
    share = ""
    if "pagetide" in results and "single" in names:
        tpot = results["pagetide"]["single"][0].tpot_s or 1
        share = f" Decode of `single` runs at {1 / tpot / limits['max_single_tokens_s']:.0%} of it."
    lines.append("")
    lines.append(
        f"Limits: memory read {limits['read_gb_s']:.0f} GB/s, so at most "
        f"{limits['max_single_tokens_s']:.0f} tokens/s for one sequence "
        f"({limits['weights_mb']:.0f} MB of weights a step).{share} Matrix products: "
        f"{limits['bfloat16_gflop_s']:.0f} GFLOP/s in bfloat16, "
        f"{limits['float32_gflop_s']:.0f} in float32 (torch)."
    )
    return "\n".join(lines)


def median_rate(runs: list[Figures]) -> float:
    return statistics.median(run.tokens_per_s for run in runs)


def draw(results: dict[str, dict[str, list[Figures]]], names: list[str], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(names), figsize=(3.2 * len(names), 0.5 * len(results) + 1.6), sharey=True
    )
    engines = list(results)[::-1]
    for axis, name in zip([axes] if len(names) == 1 else axes, names, strict=True):
        bars = axis.barh(engines, [median_rate(results[engine][name]) for engine in engines])
        for bar, engine in zip(bars, engines, strict=True):
            bar.set_color("#1f6f8b" if engine.startswith("pagetide") else "#b0b7bd")
        axis.bar_label(bars, fmt="%.0f", padding=2, fontsize=8)
        axis.set_title(name)
        axis.margins(x=0.18)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle("output tokens per second")
    figure.tight_layout()
    figure.savefig(file, dpi=130)


def versions() -> dict[str, str]:
    import numba
    import torch
    import transformers

    cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    name = next(
        (line.split(":", 1)[1].strip() for line in cpu.splitlines() if line.startswith("model name")),
        platform.processor(),
    )
    has_bf16 = "avx512_bf16" in cpu
    return {
        "processor": name,
        "avx512_bf16": str(has_bf16),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "numba": numba.__version__,
        "transformers": transformers.__version__,
    }


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
        "--server", action="store_true", help="through Triton too, taking turns with the engine alone"
    )
    parser.add_argument(
        "--features", action="store_true", help="what each sampling feature costs a step, and nothing else"
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
        "--only", nargs="+", choices=ENGINES, metavar="ENGINE", help=f"run just these: {', '.join(ENGINES)}"
    )
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
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
    return parser.parse_args()


def engines_of(arguments: argparse.Namespace) -> list[str]:
    if arguments.only:
        return arguments.only
    if arguments.against:
        return ["pagetide", *arguments.against, "transformers bfloat16"]
    alone = [
        "pagetide",
        "pagetide, static batches, contiguous KV",
        "transformers bfloat16",
        "transformers float32",
    ]
    return [] if arguments.server and not arguments.engine else alone


def main() -> int:
    arguments = parse_arguments()
    if arguments.run_one:
        names = iter(lambda: sys.stdin.readline().strip(), "") if arguments.on_demand else arguments.workloads
        run_one(arguments.run_one, names, arguments.seed)
        return 0
    if arguments.streams_alone:
        run_streams_alone(arguments.seconds, arguments.streams_alone)
        return 0
    if arguments.streams is not None:
        rows = measure_streams(arguments.streams or [1, 4, 8, 32], arguments.seconds)
        print(streams.table(rows))
        print(json.dumps({"machine": versions(), "streams": streams.as_json(rows)}))
        return 0
    if arguments.chunks is not None:
        ways = measure_chunks(arguments.chunks, arguments.seconds)
        print(streams.cost_table(ways))
        print(
            json.dumps(
                {
                    "machine": versions(),
                    "chunks": {name: streams.as_json([row]) for name, row in ways.items()},
                }
            )
        )
        return 0
    if arguments.host:
        times = host.measure([32, 256])
        print(host.table(times))
        print(json.dumps({"machine": versions(), "host_us": times}))
        return 0
    if arguments.ops:
        limits = machine_limits()
        found = ops.measure(CACHE, {"read_gb_s": limits["read_gb_s"], "gflop_s": limits["bfloat16_gflop_s"]})
        print(ops.table(found))
        print(json.dumps({"machine": versions(), "limits": limits, "ops": ops.as_json(found)}))
        return 0
    if arguments.features:
        costs = feature_costs(max(arguments.repeats, 3))
        print(report_costs(costs))
        print(json.dumps({"machine": versions(), "step_ratios": costs}))
        return 0
    results: dict[str, dict[str, list[Figures]]] = {}
    peaks: dict[str, float] = {}
    engines = engines_of(arguments)
    for repeat in range(arguments.repeats):
        for engine in engines:
            begin = time.perf_counter()
            print(
                f"round {repeat + 1} of {arguments.repeats}: {engine} ...",
                end=" ",
                file=sys.stderr,
                flush=True,
            )
            try:
                found, peak = measure(engine, arguments.workloads, repeat)
            except subprocess.CalledProcessError as error:
                if engine not in (arguments.against or ()):
                    raise
                print(f"did not run ({error}); the others go on", file=sys.stderr)
                continue
            for name, result in found.items():
                results.setdefault(engine, {}).setdefault(name, []).append(result)
            peaks[engine] = max(peaks.get(engine, 0), peak)
            print(f"{time.perf_counter() - begin:.0f} s", file=sys.stderr)
    limits = machine_limits()
    if results:
        print(report(results, peaks, arguments.workloads, limits))
    shares = served_shares(arguments.workloads, max(arguments.repeats, 3)) if arguments.server else {}
    if shares:
        print(report_shares(shares))
    summary = {
        "machine": versions(),
        "limits": limits,
        "peak_mb": peaks,
        "served_shares": shares,
        "results": {
            engine: {name: [asdict(run) for run in runs] for name, runs in by_name.items()}
            for engine, by_name in results.items()
        },
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(summary, indent=1))
    if arguments.plot:
        draw(results, arguments.workloads, arguments.plot)
    print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
