"""The engines that benchmark.py compares, each with the same jobs: Pagetide alone and through Triton,
transformers, and those of scripts/peers.sh.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import os
import statistics
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gateway_process import start_gateway, stop_gateway
from pagetide.config import settings_fields
from triton_server import REPOSITORY, ROOT, TritonServer, free_address
from workloads import MAX_RUNNING, Job

CACHE = str(ROOT / ".cache")


@dataclass
class Figures:
    """What a run of one workload gives. Times in seconds; ttft and tpot are medians over its requests, which
    count from when they came.
    """

    tokens_per_s: float
    ttft_s: float | None = None
    tpot_s: float | None = None
    ttft_p99_s: float | None = None
    tpot_p99_s: float | None = None
    seconds: float = 0.0


# Runs the workloads of these names on the model in this folder, the embedded one if that is empty; the first
# that it yields is a warm-up.
Engine = Callable[[Callable[[str], list[Job]], Iterable[str], str], Iterator[tuple[str, Figures]]]


def run_pagetide(
    jobs_of: Callable[[str], list[Job]], names: Iterable[str], model: str, **settings: Any
) -> Iterator[tuple[str, Figures]]:
    """The engine without a server."""
    from pagetide.llm import LLM
    from pagetide.types import Request, SamplingParams

    llm = LLM(model, cache_dir=CACHE, max_num_seqs=MAX_RUNNING, **settings)
    engine, numbers = llm.engine, iter(range(10**9))
    for name in itertools.chain(["single"], names):  # the first one warms up
        jobs = jobs_of(name)
        first, last, counts, numbered = {}, {}, {}, {}
        coming = deque(sorted(enumerate(jobs), key=lambda pair: pair[1].at))
        begin = time.perf_counter()
        while coming or engine.has_work:
            now = time.perf_counter() - begin
            while coming and coming[0][1].at <= now:
                i, job = coming.popleft()
                params = SamplingParams(temperature=0, max_tokens=job.num_tokens, ignore_eos=True)
                number = next(numbers)
                numbered[number] = i
                engine.add(Request(number=number, prompt_ids=job.prompt, params=params, stream=True))
            if not engine.has_work:
                time.sleep(max(0.0, coming[0][1].at - now))
                continue
            for output in engine.step().outputs:
                i, now = numbered[output.number], time.perf_counter() - begin
                first.setdefault(i, now)
                last[i] = now
                counts[i] = counts.get(i, 0) + len(output.ids)
        yield name, figures(time.perf_counter() - begin, jobs, first, last, counts)


def run_transformers(
    jobs_of: Callable[[str], list[Job]], names: Iterable[str], model: str, dtype: str
) -> Iterator[tuple[str, Figures]]:
    """transformers' generate in static batches of 32: each batch runs until its longest answer is there."""
    import torch
    from pagetide.models.source import find_model
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(
        str(find_model(model, Path(CACHE))), dtype=getattr(torch, dtype)
    ).eval()

    def generate(batch: list[Job]) -> None:
        longest, new = max(len(job.prompt) for job in batch), max(job.num_tokens for job in batch)
        ids = torch.tensor([[0] * (longest - len(job.prompt)) + job.prompt for job in batch])
        mask = torch.tensor([[0] * (longest - len(job.prompt)) + [1] * len(job.prompt) for job in batch])
        with torch.inference_mode():
            out = loaded.generate(
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
        yield name, Figures(count / seconds, first, tpot, seconds=seconds)


def run_server(
    jobs_of: Callable[[str], list[Job]], names: Iterable[str], model: str, stream: bool
) -> Iterator[tuple[str, Figures]]:
    """Through Triton's ensemble over gRPC."""
    with started_server(model=model) as server:
        for name in ["single", *names]:
            yield name, run_served(server, jobs_of(name), stream)


@contextmanager
def started_server(
    max_running: int = MAX_RUNNING, model: str = "", repository: Path = REPOSITORY
) -> Iterator[TritonServer]:
    settings = {"cache_dir": CACHE, "max_num_seqs": max_running, "model": model}
    server = TritonServer(free_address(), settings, repository)
    server.start()
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()


@contextmanager
def started_gateway(server: TritonServer) -> Iterator[int]:
    """An OpenAI gateway for the server; yields its port."""
    port = free_address().http_port
    start_gateway(server.folder, server.address, port, ends_with_parent=True)
    try:
        yield port
    finally:
        stop_gateway(server.folder)


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
    return figures(seconds, jobs, answers.first if stream else {}, answers.last, answers.counts)


def run_gateway(port: int, jobs: list[Job]) -> Figures:
    """The same as streams of the gateway's /v1/completions, on a connection each."""
    first: dict[int, float] = {}
    last: dict[int, float] = {}
    counts: dict[int, int] = {}

    async def ask(number: int, job: Job) -> None:
        body = json.dumps(
            {
                "model": "ensemble",
                "prompt": job.prompt,
                "max_tokens": job.num_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        ).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
        async for line in reader:
            if line.startswith(b"data: {"):
                last[number] = time.perf_counter() - begin
                first.setdefault(number, last[number])
                if usage := json.loads(line[6:]).get("usage"):
                    counts[number] = usage["completion_tokens"]
        writer.close()

    async def ask_all() -> None:
        await asyncio.gather(*(ask(number, job) for number, job in enumerate(jobs)))

    begin = time.perf_counter()
    asyncio.run(ask_all())
    seconds = time.perf_counter() - begin
    assert counts == {number: job.num_tokens for number, job in enumerate(jobs)}
    return figures(seconds, jobs, first, last, counts)


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
        self.first: dict[int, float] = {}
        self.last: dict[int, float] = {}
        self.counts: dict[int, int] = {}
        self._num_open = num_requests
        self._error = ""
        self._done = threading.Event()
        self._begin = time.perf_counter()

    def receive(self, result: Any, error: Any) -> None:
        if error is not None:
            self._error = str(error)
            self._done.set()
            return
        now, number = time.perf_counter() - self._begin, int(result.get_response().id)
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
    seconds: float, jobs: list[Job], first: dict[int, float], last: dict[int, float], counts: dict[int, int]
) -> Figures:
    """From the times of each job's first and last token; empty where nothing was streamed."""
    waits = [first[i] - jobs[i].at for i in first]
    gaps = [(last[i] - first[i]) / (counts[i] - 1) for i in first if counts[i] > 1]
    return Figures(
        sum(counts.values()) / seconds,
        _median(waits),
        _median(gaps),
        _percentile(waits),
        _percentile(gaps),
        seconds,
    )


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def _percentile(values: list[float], share: float = 0.99) -> float | None:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else None


QUANTIZATIONS = [  # of a CPU
    choice
    for field in settings_fields()
    if field.name == "quantization"
    for choice in field.choices
    if choice not in ("none", "fp8")
]
PEERS = ROOT / ".peers"  # where scripts/peers.sh installs other engines


def run_peer(
    jobs_of: Callable[[str], list[Job]], names: Iterable[str], model: str, peer: str, form: str = ""
) -> Iterator[tuple[str, Figures]]:
    """Another engine, in the environment that scripts/peers.sh has made for it; form: how the model is
    quantized.
    """
    with subprocess.Popen(
        peer_command(peer, model, form),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=peer_environment(peer),
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        for name in ["single", *names]:
            jobs = jobs_of(name)
            print(json.dumps([asdict(job) for job in jobs]), file=process.stdin, flush=True)
            result = json.loads(process.stdout.readline())
            first, last, counts = (dict(enumerate(result[key])) for key in ("first", "last", "counts"))
            yield name, figures(result["seconds"], jobs, first, last, counts)
        process.stdin.close()


def peer_command(peer: str, model: str, form: str = "") -> list[str]:
    """Starts scripts/peer_engines.py for this engine."""
    from pagetide.models.source import find_model

    folder = find_model(model, Path(CACHE)).resolve()
    program = [str(PEERS / peer / "bin" / "python"), str(ROOT / "scripts" / "peer_engines.py")]
    name = name_for_peers(folder) + (f"-{form}" if form else "")
    return [*program, peer, str(PEERS), "bfloat16", str(folder), name]


def name_for_peers(folder: Path) -> str:
    """Under which scripts/peers.sh keeps what it has converted; another one when the model's files change."""
    files = [(file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(folder.glob("*.safetensors"))]
    return f"{folder.name}-{hashlib.blake2b(f'{folder} {files}'.encode(), digest_size=4).hexdigest()}"


def peer_environment(peer: str) -> dict[str, str]:
    """What vLLM's documentation asks for: its OpenMP runtime, and tcmalloc where the system has it; and all
    cores, of which it would keep one for its scheduler.
    """
    if peer != "vllm":
        return dict(os.environ)
    files = [PEERS / "vllm" / "lib" / "libiomp5.so", *Path("/usr/lib").glob("*/libtcmalloc_minimal.so.4")]
    return {
        **os.environ,
        "LD_PRELOAD": ":".join(str(file) for file in files if file.exists()),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(str(core) for core in sorted(os.sched_getaffinity(0))),
    }


ENGINES: dict[str, Engine] = {
    "pagetide": run_pagetide,
    "pagetide, static batches, contiguous KV": partial(
        run_pagetide, batching="static", kv_reservation="contiguous"
    ),
    "pagetide float32": partial(run_pagetide, dtype="float32"),
    **{f"pagetide {form}": partial(run_pagetide, quantization=form) for form in QUANTIZATIONS},
    "transformers bfloat16": partial(run_transformers, dtype="bfloat16"),
    "transformers float32": partial(run_transformers, dtype="float32"),
    "openvino": partial(run_peer, peer="openvino"),
    "vllm": partial(run_peer, peer="vllm"),
    "llamacpp": partial(run_peer, peer="llamacpp"),
    "openvino int8": partial(run_peer, peer="openvino", form="int8"),
    "llamacpp Q8_0": partial(run_peer, peer="llamacpp", form="Q8_0"),
    "llamacpp Q4_1": partial(run_peer, peer="llamacpp", form="Q4_1"),
    "pagetide through Triton, streams": partial(run_server, stream=True),
    "pagetide through Triton, whole answers": partial(run_server, stream=False),
}
