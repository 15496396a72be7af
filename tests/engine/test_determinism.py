"""A request's tokens and log-probabilities are the same to the last bit, whatever runs beside it, however its
prompt is chunked, cached or preempted, on however many threads, and whether its tokens are guessed or not.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import random_adapter
from cases import run_on_older_processor
from hypothesis import example, given, settings
from hypothesis import strategies as st
from models import FAMILIES, write_model
from pagetide.config import SettingsError
from pagetide.llm import LLM, RequestOutput
from pagetide.types import SamplingParams
from transformers import LlamaConfig, MistralConfig, PretrainedConfig

SHAPE: dict[str, Any] = {
    "vocab_size": 517,
    "hidden_size": 192,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
}
CASES: dict[str, tuple[PretrainedConfig, dict[str, Any]]] = {
    "float32": (LlamaConfig(**SHAPE), {"dtype": "float32"}),
    "bfloat16": (LlamaConfig(**SHAPE), {"dtype": "bfloat16"}),
    "window": (MistralConfig(**SHAPE, sliding_window=200), {"dtype": "bfloat16"}),
    "w8a8": (LlamaConfig(**SHAPE), {"quantization": "w8a8"}),
    "w4a16": (LlamaConfig(**SHAPE), {"quantization": "w4a16"}),
    "KV cache in 8 bits": (LlamaConfig(**SHAPE), {"kv_cache_dtype": "int8"}),
    "adapters": (LlamaConfig(**SHAPE), {"lora_dir": "", "max_loras": 2}),
    "adapters, w8a8": (LlamaConfig(**SHAPE), {"lora_dir": "", "quantization": "w8a8"}),
}
ADAPTERS = ["", "a", "b", "c"]


def lengths() -> st.SearchStrategy[list[int]]:
    """Of prompts: of those that attention sums in one segment, and of several."""
    return st.lists(st.one_of(st.integers(1, 80), st.integers(480, 1100)), min_size=2, max_size=5)


COMPANY = st.fixed_dictionaries(
    {
        "max_num_batched_tokens": st.sampled_from([17, 100, 512]),
        "max_num_seqs": st.sampled_from([2, 5, 8]),
        "num_blocks": st.sampled_from([90, 400]),
        "num_threads": st.sampled_from([1, 2]),
        "num_speculative_tokens": st.sampled_from([0, 3]),
        "prompt_lookup_min": st.just(1),
    }
)


# Contexts of several segments, which are split over threads when one sequence runs, and not in this company.
LONG = (
    [1000, 900, 1100, 700, 1024],
    {
        "max_num_batched_tokens": 512,
        "max_num_seqs": 8,
        "num_blocks": 400,
        "num_threads": 1,
        "num_speculative_tokens": 3,
        "prompt_lookup_min": 1,
    },
    random.Random(1),
)


def run(folder: Path, groups: list[list[list[int]]], **options: Any) -> list[RequestOutput]:
    """The groups one after the other, each all together."""
    llm = LLM(str(folder), device="cpu", cache_dir=str(folder / "cache"), deterministic=True, **options)
    params = SamplingParams(
        temperature=0.8, seed=3, max_tokens=6, ignore_eos=True, logprobs=1, prompt_logprobs=1
    )
    has_adapters = "lora_dir" in options
    try:
        return [
            answer
            for group in groups
            for answer in llm.generate(
                group, params, lora_name=[ADAPTERS[sum(prompt) % 4 * has_adapters] for prompt in group]
            )
        ]
    finally:
        llm.close()


def told(answer: RequestOutput) -> tuple[Any, ...]:
    (one,) = answer.outputs
    return one.token_ids, one.logprobs, answer.prompt_logprobs


@pytest.mark.parametrize("name", CASES)
def test_nothing_depends_on_company(name, tmp_path):
    config, options = CASES[name]
    write_model(tmp_path, config)
    if "lora_dir" in options:
        options = {**options, "lora_dir": str(tmp_path / "adapters")}
        for seed, adapter in enumerate(ADAPTERS[1:]):
            random_adapter.write(tmp_path / "adapters" / adapter, str(tmp_path), rank=9, seed=seed)

    @settings(max_examples=6)
    @given(lengths(), COMPANY, st.randoms(use_true_random=False))
    @example(*LONG)
    def check(counts: list[int], company: dict[str, int], rng: Any) -> None:
        prompts = [[rng.randrange(6, 500) for _ in range(count)] for count in counts]
        prompts.append((prompts[0] + prompts[1])[:1300])  # with a prefix that may be cached
        alone = run(
            tmp_path,
            [[prompt] for prompt in prompts],
            **options,
            num_blocks=400,
            max_num_batched_tokens=4096,
            enable_prefix_caching=False,
        )
        together = run(tmp_path, [prompts, prompts[::-1]], **options, **company)
        for found in (together[: len(prompts)], together[len(prompts) :][::-1]):
            assert [told(answer) for answer in found] == [told(answer) for answer in alone]

    check()


def test_on_an_older_processor():
    run_on_older_processor(__file__, ["test_nothing_depends_on_company[bfloat16]"])


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (FAMILIES["llama2"], {"ops": "reference"}),
        (FAMILIES["sizes that no kernel takes"], {}),
        (LlamaConfig(**{**SHAPE, "num_key_value_heads": 3}), {"tensor_parallel_size": 3}),
    ],
)
def test_what_does_depend_on_it_is_refused(config, options, tmp_path):
    write_model(tmp_path, config)
    with pytest.raises(SettingsError, match="deterministic is true"):
        run(tmp_path, [[[7, 8]]], dtype="float32", **options)
