"""Every family against transformers, on random weights, with the CPU's kernels and with the reference
operations.
"""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from models import FAMILIES, SIZES, greedy, write_model
from pagetide.config import Settings
from pagetide.kv_cache.store import TorchStore
from pagetide.llm import LLM
from pagetide.models.config import UnsupportedModelError
from pagetide.models.decoder import Decoder, layer_shape
from pagetide.models.families import read_model
from pagetide.models.rotary import rotary_tables
from pagetide.models.sharding import make_shard
from pagetide.models.weights import Checkpoint
from pagetide.ops.batch import Batch
from pagetide.ops.cpu.layers import CompiledLayers
from pagetide.ops.select import select_ops
from pagetide.types import SamplingParams
from transformers import Phi3Config


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


LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [1.0 + i / 2 for i in range(8)],
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize("ops", ["auto", "reference"])
def test_what_may_become_long_is_turned_as_long_texts_are(ops, tmp_path):
    """transformers changes the angles when a text has outgrown the factors for short ones."""
    model = write_model(tmp_path, Phi3Config(**SIZES, rope_parameters=LONG_ROPE))
    ids = random.Random(1).choices(range(199), k=150)
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0]
    file = tmp_path / "config.json"
    told = json.loads(file.read_text())
    rope = told.pop("rope_parameters")
    told |= {name: rope.pop(name) for name in ("rope_theta", "original_max_position_embeddings")}
    del rope["rope_type"]
    file.write_text(json.dumps(told | {"rope_scaling": rope | {"type": "su"}}))  # as in older files
    logits = prompt_logits(tmp_path, ids, ops, is_compiled=ops == "auto")
    torch.testing.assert_close(logits, expected, atol=2e-3, rtol=2e-3)


OLDER_NAMES: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "gemma3": (
        "gemma3",
        ("rope_parameters", "layer_types", "tie_word_embeddings"),
        {
            "rope_theta": 1e6,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "rope_local_base_freq": 10000.0,
            "sliding_window_pattern": 2,
        },
    ),
    "gemma2": (
        "gemma2",
        ("rope_parameters", "layer_types", "tie_word_embeddings"),
        {"rope_theta": 10000.0, "hidden_act": "gelu"},
    ),
    "phi4-mini": ("phi4-mini", ("rope_parameters",), {"rope_theta": 10000.0, "partial_rotary_factor": 0.75}),
    "smollm3": ("smollm3", ("no_rope_layers", "layer_types", "tie_word_embeddings"), {}),
}


@pytest.mark.parametrize("name", OLDER_NAMES)
def test_files_of_older_versions_say_the_same_by_other_names(name, tmp_path):
    family, gone, older = OLDER_NAMES[name]
    write_model(tmp_path, FAMILIES[family])
    file = tmp_path / "config.json"
    told = json.loads(file.read_text())
    _, config = read_model(tmp_path)
    for field in gone:
        del told[field]
    file.write_text(json.dumps(told | older))
    _, found = read_model(tmp_path)
    assert (found.windows, found.rope_of_layer) == (config.windows, config.rope_of_layer)
    device = torch.device("cpu")
    assert torch.equal(rotary_tables(found, 100, device), rotary_tables(config, 100, device))
    assert replace(found, ropes=()) == replace(config, ropes=())
    assert found.max_position == SIZES["max_position_embeddings"]


def test_a_window_as_long_as_the_context_is_none(tmp_path):
    write_model(tmp_path, Phi3Config(**SIZES, sliding_window=512))
    assert read_model(tmp_path)[1].windows == (0, 0, 0)
    config = {**FAMILIES["gemma3"].to_dict(), "sliding_window": 512, "architectures": ["Gemma3ForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    _, found = read_model(tmp_path)
    assert (found.windows, found.rope_of_layer) == ((0, 0, 0), (1, 0, 1)), "its angles are local all the same"


def test_unknown_architecture_is_refused_with_the_known_ones(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    with pytest.raises(
        UnsupportedModelError, match="GPT2LMHeadModel is not supported; known: LlamaForCausalLM"
    ):
        read_model(tmp_path)
