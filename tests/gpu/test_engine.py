"""What only a GPU shows of the engine: its memory, its graphs, its types, whole answers of every family.

Elsewhere all of it is skipped. tests/engine/test_gpu_ops.py and test_gpu_engine.py run on both.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from models import FAMILIES, greedy, write_model
from pagetide.kv_cache.layout import KVLayout
from pagetide.kv_cache.store import CupyStore, make_store
from pagetide.llm import LLM
from pagetide.types import SamplingParams

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
SIZES: dict[str, Any] = {
    "dtype": "float32",
    "num_blocks": 60,
    "max_model_len": 160,
    "max_num_batched_tokens": 48,
    "max_num_seqs": 8,  # few sizes to record
    "check_integrity": True,
}


def prompts() -> list[list[int]]:
    chooser = random.Random(1)
    found = [chooser.choices(range(6, 199), k=k) for k in (1, 3, 17, 64, 90, 33)]
    return [*found, [*found[4][:80], 7, 8]]


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_tokens_equal_transformers_in_any_company(name, tmp_path):
    model = write_model(tmp_path, FAMILIES[name])
    engine = LLM(
        str(tmp_path), device="cuda", cache_dir=str(tmp_path / "cache"), **{**SIZES, "num_blocks": 40}
    )
    results = engine.generate(prompts(), SamplingParams(temperature=0, max_tokens=24))
    assert engine.engine.scheduler.counters.preemptions + results[-1].num_cached_tokens > 0
    for prompt, result in zip(prompts(), results, strict=True):
        assert result.outputs[0].token_ids == greedy(model, prompt, 24)
    engine.close()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_small_types_say_what_float32_says_for_a_while(dtype, tmp_path):
    model = write_model(tmp_path, FAMILIES["llama3.1"])
    engine = LLM(str(tmp_path), device="cuda", cache_dir=str(tmp_path / "cache"), **{**SIZES, "dtype": dtype})
    results = engine.generate(prompts(), SamplingParams(temperature=0, max_tokens=1))
    same = [
        result.outputs[0].token_ids == greedy(model, prompt, 1)
        for prompt, result in zip(prompts(), results, strict=True)
    ]
    assert sum(same) >= len(same) - 2
    engine.close()


def test_the_cache_takes_the_free_memory_that_it_may(tmp_path):
    write_model(tmp_path, FAMILIES["llama2"])
    engine = LLM(str(tmp_path), device="cuda", cache_dir=str(tmp_path / "cache"), gpu_memory_fraction=0.02)
    assert engine.engine.info.num_blocks > 1000
    assert (
        len(engine.generate([[7, 8, 9]], SamplingParams(temperature=0, max_tokens=8))[0].outputs[0].token_ids)
        > 0
    )
    engine.close()


def test_the_pools_are_cupys_memory():
    cupy = pytest.importorskip("cupy")
    device = torch.device("cuda", 0)
    layout = KVLayout(3, (2, 16, 2, 16), torch.bfloat16)
    store = make_store(layout, 20, device, num_host_blocks=7)
    assert isinstance(store, CupyStore) and store.pool.data_ptr() == store._owner.data.ptr
    assert store.pool.shape == layout.pool_shape(20) and not store.pool.any()
    assert store.host_pool.shape == layout.pool_shape(7)
    attributes = cupy.cuda.runtime.pointerGetAttributes(store.host_pool.data_ptr())
    assert attributes.devicePointer, "kernels read and write it where it is"


def test_no_step_waits_for_the_device_but_for_its_tokens(tmp_path):
    write_model(tmp_path, FAMILIES["qwen3"])
    engine = LLM(str(tmp_path), device="cuda", cache_dir=str(tmp_path / "cache"), **SIZES)
    params = [
        SamplingParams(temperature=0, max_tokens=12, ignore_eos=True),
        SamplingParams(temperature=0.8, top_k=5, top_p=0.9, max_tokens=9, presence_penalty=0.3),
    ]
    asked = [params[i % 2] for i in range(len(prompts()))]
    expected = engine.generate(prompts(), asked)  # compiles, and records what is recorded late
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = engine.generate(prompts(), asked)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [r.outputs[0].token_ids for r in found[::2]] == [r.outputs[0].token_ids for r in expected[::2]]
    engine.close()


def test_recorded_steps_say_what_single_launches_say(tmp_path):
    write_model(tmp_path, FAMILIES["smollm2"])
    answers = []
    for cuda_graphs in (True, False):
        engine = LLM(
            str(tmp_path), device="cuda", cache_dir=str(tmp_path / "cache"), cuda_graphs=cuda_graphs, **SIZES
        )
        results = engine.generate(prompts(), SamplingParams(seed=3, top_p=0.9, max_tokens=24))
        answers.append([result.outputs[0].token_ids for result in results])
        engine.close()
    assert answers[0] == answers[1]
