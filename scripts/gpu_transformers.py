"""Whole answers of Pagetide and of transformers on the same GPU, for scripts/gpu_check.py: a static batch of
equal lengths, which is the best case of the latter.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from functools import partial

import torch
import transformers
from gpu_engine import MODELS, engine
from gpu_scale import Rows, Scale
from pagetide.types import SamplingParams


def measure_transformers(scale: Scale) -> Rows:
    """Output tokens a second of each, greedy, random weights in the shapes of the first model."""
    name = scale.models[0]
    batch, num_in, num_out = (64, 128, 128) if scale.is_gpu else (2, 10, 3)
    chooser = random.Random(0)
    prompts = [[chooser.randrange(3, 90) for _ in range(num_in)] for _ in range(batch)]

    own = _own_rate(scale, name, prompts, num_out)
    theirs = _their_rate(scale, name, prompts, num_out)
    workload = f"{batch} x ({num_in} in, {num_out} out)"
    figures = {"tokens/s": own, "transformers": theirs, "ratio": own / theirs}
    return [{"model": name, "workload": workload, **figures}]


def _own_rate(scale: Scale, name: str, prompts: list[list[int]], num_out: int) -> float:
    with engine(name, scale) as (llm, _):
        params = SamplingParams(temperature=0, max_tokens=num_out, ignore_eos=True)
        return _rate(scale, len(prompts) * num_out, partial(llm.generate, prompts, params))


def _their_rate(scale: Scale, name: str, prompts: list[list[int]], num_out: int) -> float:
    model = _model(name, scale)
    ids = torch.tensor(prompts, device=scale.device)

    @torch.inference_mode()
    def generate() -> None:
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=num_out,
            max_new_tokens=num_out,
            pad_token_id=0,
        )
        assert found.shape == (len(prompts), len(prompts[0]) + num_out), found.shape

    return _rate(scale, len(prompts) * num_out, generate)


def _model(name: str, scale: Scale) -> torch.nn.Module:
    fields = {key: value for key, value in MODELS[name].items() if key != "architectures"}
    kind = getattr(transformers, MODELS[name]["architectures"][0])
    return kind(kind.config_class(**fields)).to(scale.device, scale.dtype).eval()


def _rate(scale: Scale, num_tokens: int, generate: Callable[[], object]) -> float:
    """The best of some runs, behind one that compiles what it needs."""
    times = []
    for _ in range(4 if scale.is_gpu else 2):
        begin = time.perf_counter()
        generate()
        if scale.is_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return num_tokens / min(times[1:])
