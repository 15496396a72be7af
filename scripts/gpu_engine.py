"""The whole engine on a GPU, for scripts/gpu_check.py: steps, prompts and workloads of random models."""

from __future__ import annotations

import gc
import json
import random
import tempfile
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from gpu_scale import Rows, Scale, share
from pagetide.llm import LLM
from pagetide.models.config import DecoderConfig
from pagetide.models.families import read_model
from pagetide.runner.plan import Admission, RowParams, StepPlan
from pagetide.types import SamplingParams

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


class Form(NamedTuple):
    """How an engine keeps weights and cache: its settings, and bytes of a layer's weight (with its part of
    scales and minima), of one of the head's, and of a key's or value's element.
    """

    settings: dict[str, Any]
    layer: float
    head: float
    kv: float


COUNT = Form({}, 1, 1, 1)  # instead of bytes


def plain(scale: Scale) -> Form:
    size = scale.dtype.itemsize
    return Form({}, size, size, size)


def quantized(scale: Scale) -> dict[str, Form]:
    size = scale.dtype.itemsize
    return {
        "w8a16": Form({"quantization": "w8a16"}, 1 + 1 / 16, 1 + 1 / 16, size),
        "w4a16": Form({"quantization": "w4a16"}, 1 / 2 + 1 / 8, 1 + 1 / 16, size),
        "fp8": Form({"quantization": "fp8"}, 1, size, size),
        "fp8, KV fp8": Form({"quantization": "fp8", "kv_cache_dtype": "fp8"}, 1, size, 1),
    }


def bytes_of(config: DecoderConfig, form: Form) -> tuple[float, float]:
    """(bytes of weights that a decode step reads, bytes of a token's keys and values)."""
    heads = 2 * config.num_heads + 2 * config.num_kv_heads
    layer = heads * config.head_dim * config.hidden_size + 3 * config.hidden_size * config.intermediate_size
    weights = config.num_layers * layer * form.layer + config.vocab_size * config.hidden_size * form.head
    return weights, 2 * config.num_layers * config.num_kv_heads * config.head_dim * form.kv


def measure_steps(scale: Scale) -> Rows:
    """A decode step, sampling included, against the time in which memory gives weights, keys and values."""
    return [row for name in scale.models for row in steps_of(scale, name, plain(scale))]


def measure_quantized(scale: Scale) -> Rows:
    """The same of the largest model with quantized weights and cache."""
    forms = quantized(scale)
    names = list(forms) if scale.is_gpu else list(forms)[-1:]
    return [{"form": form, **row} for form in names for row in steps_of(scale, scale.models[-1], forms[form])]


def steps_of(scale: Scale, name: str, form: Form) -> Rows:
    rows = []
    with engine(name, scale, **form.settings) as (llm, config):
        weights, kv = bytes_of(config, form)
        runner, info = llm.engine.runner, llm.engine.info
        for context in (512, 4096) if scale.is_gpu else (40,):
            for batch in (1, 8, 64, 256) if scale.is_gpu else (2,):
                if batch * (context + 64) > info.num_blocks * info.block_size or batch > info.max_num_seqs:
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
            weights, _ = bytes_of(config, COUNT)
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
    return [row for name in scale.models for row in serving_of(scale, name, plain(scale), quick)]


def measure_quantized_serving(scale: Scale, quick: bool) -> Rows:
    """The same of the largest model with weights and cache in FP8."""
    return serving_of(scale, scale.models[-1], quantized(scale)["fp8, KV fp8"], quick)


def serving_of(scale: Scale, name: str, form: Form, quick: bool) -> Rows:
    rows = []
    with engine(name, scale, **form.settings) as (llm, config):
        weights, kv = bytes_of(config, form)
        for workload, lengths in workloads(scale, quick).items():
            chooser = random.Random(1)
            prompts = [[chooser.randrange(3, 90) for _ in range(prompt)] for prompt, _ in lengths]
            params = [
                SamplingParams(temperature=0.6, max_tokens=answer, ignore_eos=True) for _, answer in lengths
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
                    "of the serial limit": share(serial_limit(lengths, config, weights, kv, scale), seconds),
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
    weights: float,
    kv: float,
    scale: Scale,
    batch: int = 256,
) -> float:
    """Seconds: prompts at the matrix products' rate, then decode steps at the memory's, `batch` at a time."""
    prompts = sum(prompt for prompt, _ in lengths)
    body = bytes_of(config, COUNT)[0] - config.vocab_size * config.hidden_size
    prefill = 2 * body * prompts / scale.limits["flops"]
    read = sum((prompt + answer / 2) * answer for prompt, answer in lengths) * kv
    steps = 0
    for first in range(0, len(lengths), batch):
        steps += max(answer for _, answer in lengths[first : first + batch])
    return prefill + (read + steps * weights) / scale.limits["bytes_s"]
