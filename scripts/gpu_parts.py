"""What scripts/gpu_check.py measures. Every figure is beside the limit that the same run has measured."""

from __future__ import annotations

import gc
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pagetide.llm import LLM
from pagetide.models.config import DecoderConfig
from pagetide.models.families import read_model
from pagetide.ops.attention import HeadShape
from pagetide.ops.gpu import decode, prefill
from pagetide.ops.gpu.attention import chunk_tiles
from pagetide.ops.gpu.sampling import sample
from pagetide.runner.plan import Admission, RowParams, StepPlan
from pagetide.types import SamplingParams

Rows = list[dict[str, Any]]

_COMMON = {"rms_norm_eps": 1e-6, "eos_token_id": 2, "bos_token_id": 1, "max_position_embeddings": 40_960}
MODELS: dict[str, dict[str, Any]] = {
    "Qwen3-0.6B": {
        **_COMMON,
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": 151_936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
        "rope_theta": 1e6,
    },
    "Llama-3.2-1B": {
        **_COMMON,
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
        "rope_theta": 5e5,
    },
    "Llama-3.1-8B": {
        **_COMMON,
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
        "rope_theta": 5e5,
    },
    "tiny": {
        **_COMMON,
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 99,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "tie_word_embeddings": True,
        "max_position_embeddings": 256,
    },
}


@dataclass
class Scale:
    """What is measured on a device, and how often."""

    device: torch.device
    dtype: torch.dtype
    models: list[str]
    repeats: int
    limits: dict[str, float] = field(default_factory=dict)

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    def seconds(self, function: Callable[[], Any], repeats: int = 0) -> float:
        """Seconds of one call on the device, as the median."""
        for _ in range(2):
            function()
        times = []
        for _ in range(repeats or self.repeats):
            if self.is_gpu:
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record()
                function()
                end.record()
                end.synchronize()
                times.append(begin.elapsed_time(end) / 1e3)
            else:
                start = time.perf_counter()
                function()
                times.append(time.perf_counter() - start)
        return statistics.median(times)

    def looped(self, functions: list[Callable[[], Any]]) -> float:
        """Seconds of one of the functions, all called one after the other from a graph: without launches'
        time, and with data that no cache holds if each has its own.
        """
        if not self.is_gpu:
            return self.seconds(functions[0], 1)
        for function in functions:
            function()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for function in functions:
                function()
        return self.seconds(graph.replay) / len(functions)


def measure_limits(scale: Scale) -> Rows:
    """What the machine can do at most."""
    size = 2**30 if scale.is_gpu else 2**16
    source, target = (torch.empty(size, dtype=torch.int32, device=scale.device) for _ in range(2))
    copy = 2 * source.nbytes / scale.seconds(partial(target.copy_, source))
    read = source.nbytes / scale.seconds(lambda: source.sum(dtype=torch.int32))
    n = 8192 if scale.is_gpu else 64
    a, b = (torch.randn(n, n, device=scale.device).to(scale.dtype) for _ in range(2))
    flops = 2 * n**3 / scale.seconds(lambda: a @ b)
    scale.limits |= {"bytes_s": max(copy, read), "flops": flops}
    return [{"copy TB/s": copy / 1e12, "read TB/s": read / 1e12, "matmul TFLOP/s": flops / 1e12}]


def measure_decode_attention(scale: Scale) -> Rows:
    """The decode kernel alone: bytes of keys and values a second, against the memory's."""
    cases = (
        [(1, 4096), (1, 32_768), (8, 1024), (8, 16_384), (64, 1024), (256, 1024)]
        if scale.is_gpu
        else [(2, 70)]
    )
    shapes = {"8B": HeadShape(32, 8, 128), "0.6B": HeadShape(16, 8, 128), "1B": HeadShape(32, 8, 64)}
    rows = []
    for name, shape in shapes.items() if scale.is_gpu else {"tiny": HeadShape(2, 1, 16)}.items():
        for batch, context in cases:
            copies = 1 if batch * context > 100_000 else 4
            functions = [decode_call(scale, shape, batch, context) for _ in range(copies)]
            seconds = scale.looped(functions)
            moved = batch * context * 2 * shape.num_kv_heads * shape.head_dim * scale.dtype.itemsize
            rows.append(
                {
                    "heads": name,
                    "batch": batch,
                    "context": context,
                    "us": seconds * 1e6,
                    "TB/s": moved / seconds / 1e12,
                    "of memory": share(moved / seconds, scale.limits["bytes_s"]),
                }
            )
    return rows


def decode_call(scale: Scale, shape: HeadShape, batch: int, context: int) -> Callable[[], None]:
    num_blocks = -(-context // 16)
    kv = torch.randn(num_blocks * batch, 2, shape.num_kv_heads, 16, shape.head_dim, device=scale.device).to(
        scale.dtype
    )
    table = torch.randperm(num_blocks * batch, device=scale.device).to(torch.int32).view(batch, num_blocks)
    lengths = torch.full((batch,), context, dtype=torch.int32, device=scale.device)
    order = torch.arange(batch, dtype=torch.int32, device=scale.device)
    q = torch.randn(batch, shape.num_heads, shape.head_dim, device=scale.device).to(scale.dtype)
    out = torch.empty(batch, shape.num_heads * shape.head_dim, dtype=scale.dtype, device=scale.device)
    singles = decode.plan_singles(shape, order, order, num_blocks, 16)
    return lambda: decode.attend_singles(shape, q, kv, table, lengths, 0, singles, out)


def measure_prefill_attention(scale: Scale) -> Rows:
    """The prefill kernel alone: operations a second (the causal half counted), against matrix products'."""
    shapes = {"8B": HeadShape(32, 8, 128), "1B": HeadShape(32, 8, 64)}
    rows = []
    for name, shape in shapes.items() if scale.is_gpu else {"tiny": HeadShape(2, 1, 16)}.items():
        for length in (512, 2048, 8192) if scale.is_gpu else (70,):
            seconds = scale.looped([prefill_call(scale, shape, length)] * 2)
            flops = 2 * length**2 * shape.num_heads * shape.head_dim
            rows.append(
                {
                    "heads": name,
                    "length": length,
                    "us": seconds * 1e6,
                    "TFLOP/s": flops / seconds / 1e12,
                    "of matmul": share(flops / seconds, scale.limits["flops"]),
                }
            )
    return rows


def prefill_call(scale: Scale, shape: HeadShape, length: int) -> Callable[[], None]:
    num_blocks = -(-length // 16)
    kv = torch.randn(num_blocks, 2, shape.num_kv_heads, 16, shape.head_dim, device=scale.device).to(
        scale.dtype
    )
    table = torch.randperm(num_blocks, device=scale.device).to(torch.int32).view(1, num_blocks)
    q = torch.randn(length, shape.num_heads, shape.head_dim, device=scale.device).to(scale.dtype)
    out = torch.empty(length, shape.num_heads * shape.head_dim, dtype=scale.dtype, device=scale.device)
    zero, count = np.zeros(1, np.int32), np.array([length], np.int32)
    tiles = torch.from_numpy(chunk_tiles(zero, count, zero, prefill.tokens_of_tile(shape, scale.dtype))).to(
        scale.device
    )
    return lambda: prefill.attend_chunks(shape, q, kv, table, 0, tiles, out)


DECODES = [
    (64, 4, 3, 2),
    (64, 4, 3, 1),
    (64, 4, 3, 4),
    (64, 4, 3, 8),
    (64, 4, 2, 4),
    (128, 4, 2, 2),
    (128, 8, 2, 2),
    (32, 4, 4, 4),
]
PREFILLS = [
    (128, 64, 8, 3),
    (128, 64, 8, 2),
    (128, 64, 4, 3),
    (128, 128, 8, 2),
    (64, 64, 4, 3),
    (128, 32, 8, 3),
]


def tune(scale: Scale) -> Rows:
    """The attention kernels with other tiles, warps and stages: their files say which was chosen."""
    if not scale.is_gpu:
        return []
    shape = HeadShape(32, 8, 128)
    rows: Rows = []
    chosen = decode.TILE, decode.NUM_WARPS, decode.NUM_STAGES, decode.MIN_TILES, prefill.TUNED
    for choice in DECODES:
        decode.TILE, decode.NUM_WARPS, decode.NUM_STAGES, decode.MIN_TILES = choice
        row: dict[str, Any] = {"kernel": "decode", "choice": choice}
        for batch, context in ((1, 4096), (8, 1024), (64, 1024)):
            calls = [decode_call(scale, shape, batch, context) for _ in range(4)]
            row[f"{batch} x {context}: us"] = scale.looped(calls) * 1e6
        rows.append(row)
        print(row, flush=True)
    for choice in PREFILLS:
        prefill.TUNED = prefill.Choice(*choice)
        row = {"kernel": "prefill", "choice": choice}
        try:
            row["4096: us"] = scale.looped([prefill_call(scale, shape, 4096)] * 2) * 1e6
        except Exception as error:  # too much shared memory
            row["failed"] = type(error).__name__
        rows.append(row)
        print(row, flush=True)
    decode.TILE, decode.NUM_WARPS, decode.NUM_STAGES, decode.MIN_TILES, prefill.TUNED = chosen
    return rows


def measure_sampling(scale: Scale) -> Rows:
    """One token for each of a batch's rows, beside the time that reading the logits once would take."""
    rows = []
    vocabulary = 151_936 if scale.is_gpu else 99
    for batch in (1, 64, 256) if scale.is_gpu else (2,):
        logits = torch.randn(batch, vocabulary, device=scale.device) * 3
        for name, (temperature, k, p) in {
            "greedy": (0.0, 0, 1.0),
            "temperature": (0.8, 0, 1.0),
            "top-p": (0.8, 0, 0.95),
            "top-k, top-p": (0.8, 50, 0.95),
        }.items():
            full = partial(torch.full, (batch,), device=scale.device)
            rules = (
                full(temperature),
                full(k),
                full(p),
                full(0.0),
                full(7),
                torch.arange(batch, device=scale.device),
            )
            seconds = scale.looped([partial(sample, logits, *rules)] * 2)
            least = logits.nbytes / scale.limits["bytes_s"]
            rows.append(
                {"batch": batch, "rule": name, "us": seconds * 1e6, "times one read": seconds / least}
            )
    return rows


@contextmanager
def engine(name: str, scale: Scale, **settings: Any):
    """An engine of random weights in a model's shapes."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(MODELS[name]))
        dtype = str(scale.dtype).removeprefix("torch.")
        small = {} if scale.is_gpu else {"num_blocks": 60, "max_num_batched_tokens": 32, "max_num_seqs": 4}
        begin = time.monotonic()
        llm = LLM(
            folder,
            cache_dir=folder,
            load_format="dummy",
            dtype=dtype,
            ops="triton",
            device=scale.device.type,
            enable_prefix_caching=False,
            **{**small, **settings},
        )
        print(f"  {name}: loaded in {time.monotonic() - begin:.1f} s", flush=True)
        try:
            _, config = read_model(Path(folder))
            yield llm, config
        finally:
            llm.close()
            del llm
            gc.unfreeze()  # an engine keeps what it has loaded from being collected
            gc.collect()
            if scale.is_gpu:
                torch.cuda.empty_cache()


def bytes_of(config: DecoderConfig, itemsize: int) -> tuple[int, int]:
    """(bytes of weights that a decode step reads, bytes of a token's keys and values)."""
    heads = 2 * config.num_heads + 2 * config.num_kv_heads
    layer = heads * config.head_dim * config.hidden_size + 3 * config.hidden_size * config.intermediate_size
    weights = config.num_layers * layer + config.vocab_size * config.hidden_size
    return weights * itemsize, 2 * config.num_layers * config.num_kv_heads * config.head_dim * itemsize


def measure_steps(scale: Scale) -> Rows:
    """A decode step, sampling included, against the time in which memory gives weights, keys and values."""
    rows = []
    for name in scale.models:
        with engine(name, scale) as (llm, config):
            weights, kv = bytes_of(config, scale.dtype.itemsize)
            runner, info = llm.engine.runner, llm.engine.info
            for context in (512, 4096) if scale.is_gpu else (40,):
                for batch in (1, 8, 64, 256) if scale.is_gpu else (2,):
                    if (
                        batch * (context + 64) > info.num_blocks * info.block_size
                        or batch > info.max_num_seqs
                    ):
                        continue
                    seconds = step_seconds(scale, runner, batch, context)
                    least = (weights + batch * context * kv) / scale.limits["bytes_s"]
                    rows.append(
                        {
                            "model": name,
                            "batch": batch,
                            "context": context,
                            "ms": seconds * 1e3,
                            "tokens/s": batch / seconds,
                            "of the limit": share(least, seconds),
                        }
                    )
    return rows


def step_seconds(scale: Scale, runner: Any, batch: int, context: int) -> float:
    """Of `batch` sequences that have `context` tokens each."""
    per_sequence = -(-(context + 48) // 16)
    order = np.arange(batch, dtype=np.int32)
    params = RowParams(temperature=0.6, seed=1)
    tokens = np.ones(context, np.int32)

    def plan(admissions: tuple[Admission, ...] = (), blocks: int = 0) -> StepPlan:
        return StepPlan(
            step=0,
            rows=order,
            starts=np.full(batch, context, np.int32),
            counts=np.ones(batch, np.int32),
            logit_index=order,
            sample_rows=order,
            sample_positions=np.full(batch, context + 1, np.int32),
            num_sampled=batch,
            admissions=admissions,
            block_rows=np.repeat(order, blocks).astype(np.int32),
            block_index=np.tile(np.arange(blocks, dtype=np.int32), batch),
            block_ids=np.arange(batch * blocks, dtype=np.int32),
            copies=np.empty((0, 2), np.int32),
            is_greedy=False,
        )

    def run(one: StepPlan) -> None:
        runner.forward(one)
        runner.sample(one)
        runner.wait(one)

    # One token less of each is computed, so that the first step is a decode step.
    run(plan(tuple(Admission(row, context - 1, tokens, params) for row in order.tolist()), per_sequence))
    if runner._graphs is None:
        return scale.seconds(partial(run, plan()), 2)
    replay = runner._graphs._find(runner._graphs._size(batch), True).replay
    run(plan())
    return scale.seconds(replay, 16)


def profile_steps(scale: Scale) -> Rows:
    """Which kernels a decode step's time goes to."""
    rows = []
    if not scale.is_gpu:
        return rows
    for name in scale.models:
        with engine(name, scale) as (llm, _):
            runner = llm.engine.runner
            for batch in (1, 256):
                step_seconds(scale, runner, batch, 512)
                replay = runner._graphs._find(runner._graphs._size(batch), True).replay
                with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                    for _ in range(5):
                        replay()
                    torch.cuda.synchronize()
                kernels = sorted(profile.key_averages(), key=lambda one: -one.self_device_time_total)[:16]
                rows += [
                    {
                        "model": name,
                        "batch": batch,
                        "us a step": one.self_device_time_total / 5,
                        "launches": one.count / 5,
                        "kernel": one.key[:70],
                    }
                    for one in kernels
                ]
    return rows


def measure_prefill(scale: Scale) -> Rows:
    """Prompts through the whole model, against the time that its matrix products would take at their best."""
    rows = []
    for name in scale.models:
        with engine(name, scale) as (llm, config):
            weights, _ = bytes_of(config, 1)
            for length, count in ((512, 16), (2048, 4), (8192, 1)) if scale.is_gpu else ((30, 1),):
                if length > llm.engine.info.max_model_len - 2:
                    continue
                chooser = random.Random(length)
                prompts = [[chooser.randrange(3, 90) for _ in range(length)] for _ in range(count)]
                params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
                times = []
                for _ in range(3 if scale.is_gpu else 1):
                    begin = time.perf_counter()
                    llm.generate(prompts, params)
                    times.append(time.perf_counter() - begin)
                seconds, tokens = min(times), length * count
                head = config.vocab_size * config.hidden_size
                pairs = 2 * length**2 * config.num_layers * config.num_heads * config.head_dim * count
                flops = 2 * (weights - head) * tokens + pairs
                rows.append(
                    {
                        "model": name,
                        "prompts": f"{count} x {length}",
                        "ms": seconds * 1e3,
                        "tokens/s": tokens / seconds,
                        "of matmul": share(flops / seconds, scale.limits["flops"]),
                    }
                )
    return rows


class Watched:
    """A runner that notes when each step begins and ends on the device, and the host's waits."""

    def __init__(self, inner: Any, scale: Scale):
        self._inner, self._scale = inner, scale
        self.waited = 0.0
        self.events: list[tuple[Any, Any]] = []

    def forward(self, plan: StepPlan) -> None:
        self._begin = self._event()
        self._inner.forward(plan)

    def sample(self, plan: StepPlan, masks: Any = None) -> None:
        self._inner.sample(plan, masks)
        self.events.append((self._begin, self._event()))

    def wait(self, plan: StepPlan) -> Any:
        begin = time.perf_counter()
        result = self._inner.wait(plan)
        self.waited += time.perf_counter() - begin
        return result

    def close(self) -> None:
        self._inner.close()

    def _event(self) -> Any:
        if not self._scale.is_gpu:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def idle_share(self) -> float:
        """Of the time from the first step's begin to the last one's end, what lies between steps."""
        if not self._scale.is_gpu or len(self.events) < 2:
            return 0.0
        torch.cuda.synchronize()
        whole = self.events[0][0].elapsed_time(self.events[-1][1])
        busy = sum(begin.elapsed_time(end) for begin, end in self.events)
        return 1 - busy / whole


def workloads(scale: Scale, quick: bool) -> dict[str, list[tuple[int, int]]]:
    """(prompt, answer) lengths by name."""
    if not scale.is_gpu:
        return {"tiny": [(20, 3), (5, 4)]}
    chooser = random.Random(0)
    mixed = [(chooser.randint(100, 1024), chooser.randint(100, 1024)) for _ in range(256)]
    even = {"128/128": [(128, 128)] * 1024}
    if not quick:
        even |= {
            "1000/1000": [(1000, 1000)] * 256,
            "2048/128": [(2048, 128)] * 256,
            "128/2048": [(128, 2048)] * 256,
        }
    return {"nano-vllm": mixed, **even}


def measure_serving(scale: Scale, quick: bool) -> Rows:
    """Whole workloads, all requests at once: output tokens a second, and whether the device ever waits."""
    rows = []
    for name in scale.models:
        with engine(name, scale) as (llm, config):
            weights, kv = bytes_of(config, scale.dtype.itemsize)
            for workload, lengths in workloads(scale, quick).items():
                chooser = random.Random(1)
                prompts = [[chooser.randrange(3, 90) for _ in range(prompt)] for prompt, _ in lengths]
                params = [
                    SamplingParams(temperature=0.6, max_tokens=answer, ignore_eos=True)
                    for _, answer in lengths
                ]
                inner = llm.engine.runner
                llm.engine.runner = watched = Watched(inner, scale)
                preempted = llm.engine.scheduler.counters.preemptions
                begin = time.perf_counter()
                llm.generate(prompts, params)
                seconds = time.perf_counter() - begin
                llm.engine.runner = inner
                tokens, steps = sum(answer for _, answer in lengths), len(watched.events)
                rows.append(
                    {
                        "model": name,
                        "workload": workload,
                        "s": seconds,
                        "tokens/s": tokens / seconds,
                        "of the serial limit": share(
                            serial_limit(lengths, config, weights, kv, scale), seconds
                        ),
                        "steps": steps,
                        "host ms a step": (seconds - watched.waited) / steps * 1e3,
                        "device idle": f"{100 * watched.idle_share():.1f} %",
                        "preemptions": llm.engine.scheduler.counters.preemptions - preempted,
                    }
                )
    return rows


def serial_limit(
    lengths: list[tuple[int, int]],
    config: DecoderConfig,
    weights: int,
    kv: int,
    scale: Scale,
    batch: int = 256,
) -> float:
    """Seconds: prompts at the matrix products' rate, then decode steps at the memory's, `batch` at a time."""
    prompts = sum(prompt for prompt, _ in lengths)
    body = weights / scale.dtype.itemsize - config.vocab_size * config.hidden_size
    prefill = 2 * body * prompts / scale.limits["flops"]
    read = sum((prompt + answer / 2) * answer for prompt, answer in lengths) * kv
    steps = 0
    for first in range(0, len(lengths), batch):
        steps += max(answer for _, answer in lengths[first : first + batch])
    return prefill + (read + steps * weights) / scale.limits["bytes_s"]


def share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %"


def measurements(quick: bool, dry_run: bool) -> dict[str, Callable[[], Rows]]:
    """The parts by name; the first finds the limits that the others are compared with."""
    if dry_run:
        scale = Scale(torch.device("cpu"), torch.float32, ["tiny"], 1)
    else:
        models = ["Qwen3-0.6B", "Llama-3.2-1B"] if quick else ["Qwen3-0.6B", "Llama-3.2-1B", "Llama-3.1-8B"]
        scale = Scale(torch.device("cuda"), torch.bfloat16, models, 10)

    def after_limits(function: Callable[[], Rows]) -> Callable[[], Rows]:
        def run() -> Rows:
            if not scale.limits:
                measure_limits(scale)
            return function()

        return run

    return {
        "limits": partial(measure_limits, scale),
        "decode-attention": after_limits(partial(measure_decode_attention, scale)),
        "prefill-attention": after_limits(partial(measure_prefill_attention, scale)),
        "sampling": after_limits(partial(measure_sampling, scale)),
        "steps": after_limits(partial(measure_steps, scale)),
        "prefill": after_limits(partial(measure_prefill, scale)),
        "serving": after_limits(partial(measure_serving, scale, quick)),
        "tune": after_limits(partial(tune, scale)),
        "profile": after_limits(partial(profile_steps, scale)),
    }
