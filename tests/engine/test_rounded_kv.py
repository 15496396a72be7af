"""Keys and values as 8-bit integers: attention next to that over exact ones, and whole models."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import random_layers, rotary_like, run_on_older_processor, run_steps
from hypothesis import given, settings
from hypothesis import strategies as st
from models import FAMILIES, write_model
from pagetide.config import SettingsError
from pagetide.llm import LLM
from pagetide.ops.attention import HeadShape
from pagetide.ops.cpu.attention_tasks import plan_tasks
from pagetide.ops.cpu.layers import CompiledLayers
from pagetide.ops.layers import LayerShape
from pagetide.types import SamplingParams
from quality import context_logprobs, divergence
from test_ops import single

PROMPT = [11, 60, 7, 150, 33, 90, 14, 2, 71]


def both(
    shape: LayerShape, dtype: torch.dtype, window: int, lengths: list[list[int]]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Residuals after each step over exact and over rounded keys and values; what was never written is the
    byte 255, of which scales are no numbers.
    """
    weights = random_layers(shape, dtype, window, True, False)
    exact = run_steps(CompiledLayers(shape, weights), shape, lengths, torch.nan, dtype)
    rounding = replace(shape, kv_dtype=torch.uint8)
    rounded = run_steps(CompiledLayers(rounding, weights), rounding, lengths, 255, torch.uint8)
    return list(zip(exact, rounded, strict=True))


@settings(max_examples=60)
@given(
    st.lists(
        st.lists(st.sampled_from([0, 1, 1, 1, 2, 3, 7, 16, 17, 50]), min_size=3, max_size=3).filter(any),
        min_size=1,
        max_size=6,
    ),
    st.sampled_from([(4, 4, 16), (6, 2, 32), (9, 3, 64), (7, 1, 80), (2, 1, 128)]),
    st.sampled_from([16, 48]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([0, 5, 33]),
    st.integers(0, 99),
)
def test_attention(lengths, heads, block_size, dtype, window, seed):
    torch.manual_seed(seed)
    shape = LayerShape(2, 64, 48, HeadShape(*heads), block_size, 1e-5, rotary_like(400, heads[2]))
    for exact, rounded in both(shape, dtype, window, lengths):
        assert rounded.isfinite().all()
        difference = (rounded - exact).norm() / exact.norm()
        assert difference < 0.03
        assert difference > 1e-5, "nothing was rounded"


@pytest.mark.parametrize("window", [0, 700])
def test_long_contexts(window):
    torch.manual_seed(0)
    shape = LayerShape(2, 64, 48, HeadShape(6, 2, 32), 16, 1e-5, rotary_like(3000, 32))
    assert len(plan_tasks(single(2501), shape.heads, 2).merges) == 2
    for exact, rounded in both(shape, torch.float32, window, [[2500, 5], [1, 1], [1, 0], [0, 1]]):
        assert (rounded - exact).norm() < 0.02 * exact.norm()


def test_queries_of_a_tile_that_see_nothing_of_its_last_keys():
    """Tiles on both sides of a segment's edge: of the last page, what is not written yet may be anything."""
    torch.manual_seed(0)
    shape = LayerShape(2, 64, 48, HeadShape(6, 2, 32), 16, 1e-5, rotary_like(3000, 32))
    for exact, rounded in both(shape, torch.float32, 0, [[5, 5], [513, 1], [1, 1010]]):
        assert (rounded - exact).norm() < 0.02 * exact.norm()


def test_kernels_for_a_processor_without_avx512():
    run_on_older_processor(__file__, ["test_long_contexts"])


@pytest.mark.parametrize("family", ["llama2", "qwen3", "mistral-window"])
def test_models(tmp_path, family):
    write_model(tmp_path, FAMILIES[family])
    full, own = (
        context_logprobs(
            LLM(str(tmp_path), dtype="float32", num_blocks=32, allow_logits=True, kv_cache_dtype=each), PROMPT
        )
        for each in ("auto", "int8")
    )
    assert 1e-7 < divergence(full, own).max() < 0.1


def test_shared_preempted_and_branching_sequences_give_what_single_ones_do(tmp_path):
    """Blocks that are shared, copied before they are written, and computed again."""
    write_model(tmp_path, FAMILIES["llama2"])
    prompts = [[7, 8, 9] * 12 + [i] for i in range(6)]
    params = SamplingParams(temperature=0.8, seed=3, n=2, max_tokens=24, ignore_eos=True)
    answers = []
    for blocks, together in ((200, False), (200, True), (14, True)):
        llm = LLM(
            str(tmp_path),
            dtype="float32",
            num_blocks=blocks,
            kv_cache_dtype="int8",
            check_integrity=True,
            max_model_len=64,
        )
        results = (
            llm.generate(prompts, params)
            if together
            else [llm.generate([prompt], params)[0] for prompt in prompts]
        )
        answers.append([[one.token_ids for one in result.outputs] for result in results])
    assert answers[0] == answers[1] == answers[2]


def test_blocks_take_half_the_memory():
    shapes = [
        LayerShape(2, 64, 48, HeadShape(4, 2, 64), 16, 1e-5, rotary_like(64, 64), each)
        for each in (torch.bfloat16, torch.uint8)
    ]
    exact, rounded = (
        CompiledLayers(shape, random_layers(shape, torch.bfloat16, 0, False, False)).block_shape
        for shape in shapes
    )
    assert rounded[:2] == exact[:2] and rounded[2] == exact[2] + 64  # bytes, next to elements of two


@pytest.mark.parametrize(
    "settings", [{"ops": "reference"}, {"block_size": 8}, {"kv_cache_dtype": "fp8"}], ids=str
)
def test_what_cannot_be_done_is_refused(tmp_path, settings):
    write_model(tmp_path, FAMILIES["llama2"])
    with pytest.raises(SettingsError, match="kv_cache_dtype"):
        LLM(str(tmp_path), num_blocks=32, **{"kv_cache_dtype": "int8", **settings})
