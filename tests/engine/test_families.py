"""Every family against transformers, on random weights, with the CPU's kernels and with the reference
operations.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from models import FAMILIES, greedy, write_model
from pagetide.config import Settings
from pagetide.kv_cache.store import TorchStore
from pagetide.llm import LLM
from pagetide.models.config import UnsupportedModelError
from pagetide.models.decoder import Decoder, layer_shape
from pagetide.models.families import read_model
from pagetide.models.sharding import make_shard
from pagetide.models.weights import Checkpoint
from pagetide.ops.batch import Batch
from pagetide.ops.cpu.layers import CompiledLayers
from pagetide.ops.select import select_ops
from pagetide.types import SamplingParams


def prompt_logits(folder, ids: list[int], ops: str, is_compiled: bool) -> torch.Tensor:
    """Logits at every position of one prompt that runs as one chunk."""
    family, config = read_model(folder)
    cpu, size, count = torch.device("cpu"), 16, len(ids)
    chosen = select_ops(cpu, Settings(ops=ops), torch.float32, folder)
    decoder = Decoder(
        make_shard(config, 0, 1),
        family,
        Checkpoint(folder, torch.float32, cpu),
        chosen,
        layer_shape(config, size, 512, cpu, torch.float32),
        torch.float32,
    )
    assert isinstance(decoder.layers, CompiledLayers) == is_compiled
    store = TorchStore(decoder.kv_layout(), 40, cpu)
    table = torch.randperm(40)[: -(-count // size)].to(torch.int32).unsqueeze(0)
    positions = torch.arange(count)
    batch = Batch(
        ids=torch.tensor(ids),
        positions=positions,
        slot_mapping=table[0, positions // size].long() * size + positions % size,
        block_table=table,
        lengths=torch.tensor([count], dtype=torch.int32),
        logit_index=positions,
        counts=np.array([count], np.int32),
        starts=np.array([0], np.int32),
        block_size=size,
    )
    with torch.inference_mode():
        return decoder.forward(batch, store.pool)


@pytest.mark.parametrize("ops", ["auto", "reference"])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_transformers(name, ops, tmp_path):
    model = write_model(tmp_path, FAMILIES[name])
    for length in (1, 40, 150):
        ids = random.Random(length).choices(range(199), k=length)
        with torch.inference_mode():
            expected = model(torch.tensor([ids])).logits[0]
        logits = prompt_logits(tmp_path, ids, ops, is_compiled=ops == "auto" and "no kernel" not in name)
        torch.testing.assert_close(logits, expected, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_tokens_equal_transformers_in_any_company(name, tmp_path):
    model = write_model(tmp_path, FAMILIES[name], shards=True)
    chooser = random.Random(1)
    prompts = [chooser.choices(range(6, 199), k=k) for k in (1, 3, 17, 64, 90, 33)]
    prompts.append([*prompts[4][:80], 7, 8])
    engine = LLM(
        str(tmp_path), dtype="float32", num_blocks=40, max_model_len=160, max_num_batched_tokens=48,
        check_integrity=True, cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    results = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=24))
    assert engine.engine.scheduler.counters.preemptions + results[-1].num_cached_tokens > 0
    for prompt, result in zip(prompts, results, strict=True):
        assert result.outputs[0].token_ids == greedy(model, prompt, 24)
    engine.close()


def test_unknown_architecture_is_refused_with_the_known_ones(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    with pytest.raises(
        UnsupportedModelError, match="GPT2LMHeadModel is not supported; known: LlamaForCausalLM"
    ):
        read_model(tmp_path)
