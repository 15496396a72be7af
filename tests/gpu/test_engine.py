"""The engine on a CUDA GPU, with the operations it has there so far (plain torch): against transformers,
and against itself on the CPU.

Needs a GPU; elsewhere all of it is skipped.
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
from pagetide.ops import reference
from pagetide.types import SamplingParams

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
SIZES: dict[str, Any] = {
    "dtype": "float32",
    "num_blocks": 60,
    "max_model_len": 160,
    "max_num_batched_tokens": 48,
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


RULES = {
    "samples": SamplingParams(seed=5, n=3, max_tokens=24),
    "samples of a part": SamplingParams(
        seed=6, temperature=0.7, top_k=20, top_p=0.8, min_p=0.02, max_tokens=24
    ),
    "penalties": SamplingParams(
        temperature=0, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.3, max_tokens=24
    ),
    "biases": SamplingParams(
        temperature=0, logit_bias={7: 5.0, 9: -100.0}, allowed_token_ids=tuple(range(6, 60)), max_tokens=24
    ),
    "log-probabilities": SamplingParams(temperature=0, logprobs=3, prompt_logprobs=2, max_tokens=12),
    "beams": SamplingParams(temperature=0, beam_width=3, n=3, max_tokens=12, ignore_eos=True),
}


def test_rules_give_the_tokens_that_they_give_on_a_cpu(tmp_path):
    """All of them in one batch."""
    write_model(tmp_path, FAMILIES["qwen3"])
    answers = []
    for device in ("cuda", "cpu"):
        engine = LLM(
            str(tmp_path), device=device, ops="reference", cache_dir=str(tmp_path / "cache"), **SIZES
        )
        answers.append(engine.generate([prompts()[3]] * len(RULES), list(RULES.values())))
        engine.close()
    for name, ours, theirs in zip(RULES, *answers, strict=True):
        assert [output.token_ids for output in ours.outputs] == [
            output.token_ids for output in theirs.outputs
        ], name
        for one, other in zip(ours.outputs, theirs.outputs, strict=True):
            assert [score.logprob for score in one.logprobs] == pytest.approx(
                [score.logprob for score in other.logprobs], abs=1e-3
            ), name


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


def test_the_pool_is_cupys_memory_and_copies_keep_all_layers():
    pytest.importorskip("cupy")
    device = torch.device("cuda", 0)
    store = make_store(KVLayout(3, (2, 16, 2, 16), torch.bfloat16), 20, device)
    assert isinstance(store, CupyStore) and store.pool.data_ptr() == store._owner.data.ptr
    store.pool.copy_(torch.randn(store.pool.shape, device=device))
    before = store.pool.clone()
    sources, targets = (
        torch.tensor(ids, dtype=torch.int32, device=device) for ids in ([3, 3, 19], [0, 7, 12])
    )
    store.copy_blocks(sources, targets)
    before[:, targets] = before[:, sources]
    assert torch.equal(store.pool, before)


def test_sampling_draws_the_same_tokens_as_on_a_cpu():
    generator = torch.Generator().manual_seed(3)
    rows, vocabulary = 256, 1999
    logits = torch.randn(rows, vocabulary, generator=generator) * 3
    temperature = (
        torch.rand(rows, generator=generator).mul(1.5).where(torch.rand(rows, generator=generator) > 0.2, 0.0)
    )
    rules = [
        temperature,
        torch.randint(0, 50, (rows,), generator=generator),
        torch.rand(rows, generator=generator).clamp(min=0.1),
        torch.rand(rows, generator=generator) * 0.1,
        torch.randint(-(2**62), 2**62, (rows,), generator=generator),
        torch.randint(0, 5000, (rows,), generator=generator),
    ]
    on_cpu = reference.sample(logits.clone(), *rules)
    on_gpu = reference.sample(logits.cuda(), *(rule.cuda() for rule in rules))
    # A sum in another order may put a token at top_p's border on its other side.
    assert (on_cpu == on_gpu.cpu()).sum() >= rows - 2
