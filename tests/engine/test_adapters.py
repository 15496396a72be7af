"""LoRA adapters against PEFT, several in one batch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from models import FAMILIES, adapter_configs, check_adapters, expected_of, write_adapters, write_model
from pagetide.config import SettingsError
from pagetide.llm import LLM
from pagetide.models.adapters import AdapterError, read_adapter
from pagetide.models.families import read_model
from pagetide.types import RequestError, SamplingParams
from safetensors.torch import load_file, save_file

Change = Any  # of an adapter's config and tensors, in place


@pytest.mark.parametrize("ops", ["auto", "reference"])
@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_equal_pefts(name, ops, tmp_path):
    check_adapters(tmp_path, name, FAMILIES[name], 12, ops=ops, num_blocks=60, max_model_len=120)


@pytest.mark.parametrize("max_loras", [1, 2])
def test_adapters_take_turns_where_there_are_fewer_places(max_loras, tmp_path):
    check_adapters(
        tmp_path, "qwen3", FAMILIES["qwen3"], 12, num_blocks=30, max_model_len=120, max_loras=max_loras
    )


def test_an_adapter_that_has_changed_is_read_again_and_finds_nothing_cached(tmp_path):
    model = write_model(tmp_path / "model", FAMILIES["llama2"])
    wrapped = write_adapters(tmp_path / "adapters", model, adapter_configs("llama2"))
    llm = LLM(
        str(tmp_path / "model"), dtype="float32", num_blocks=60, max_model_len=120, max_loras=1,
        cache_dir=str(tmp_path / "cache"), lora_dir=str(tmp_path / "adapters"),
    )  # fmt: skip
    prompt, params = list(range(20, 60)), SamplingParams(temperature=0, max_tokens=9)
    for source in ("all", "some", "all"):
        (tmp_path / "adapters" / "mine").mkdir(exist_ok=True)
        for file in (tmp_path / "adapters" / source).glob("adapter_*"):
            shutil.copy(file, tmp_path / "adapters" / "mine" / file.name)
        first, again = (llm.generate(prompt, params, lora_name="mine")[0] for _ in range(2))
        assert first.outputs[0].token_ids == expected_of(wrapped, source, prompt, 9)
        assert again.outputs[0].token_ids == first.outputs[0].token_ids
        assert (first.num_cached_tokens, again.num_cached_tokens) == (0, 32)
    with pytest.raises(RequestError, match="there is no adapter 'nobody'"):
        llm.generate(prompt, params, lora_name="nobody")
    assert llm.generate(prompt, params)[0].outputs[0].token_ids == expected_of(wrapped, "", prompt, 9)
    llm.close()


def test_a_folder_that_is_none_is_refused_at_start(tmp_path):
    write_model(tmp_path, FAMILIES["llama2"])
    with pytest.raises(SettingsError, match=r"lora_dir is .*, which is no folder"):
        LLM(str(tmp_path), lora_dir=str(tmp_path / "config.json"), cache_dir=str(tmp_path / "cache"))


MODULE = "base_model.model.model.layers.1.self_attn.o_proj"


def set_tensor(name: str, values: torch.Tensor) -> Change:
    return lambda config, tensors: tensors.update({f"{MODULE}.{name}.weight": values})


def rename(new: str) -> Change:
    return lambda config, tensors: tensors.update({new: tensors.pop(f"{MODULE}.lora_A.weight")})


def set_field(name: str, value: Any) -> Change:
    return lambda config, tensors: config.update({name: value})


WRONG: dict[str, tuple[Change, str]] = {
    "kind": (set_field("peft_type", "IA3"), "says peft_type 'IA3'; it must be 'LORA'"),
    "dora": (set_field("use_dora", True), "uses use_dora, which is not supported"),
    "bias": (set_field("bias", "all"), "uses bias"),
    "saved": (set_field("modules_to_save", ["lm_head"]), "uses modules_to_save"),
    "alpha": (set_field("lora_alpha", "big"), "an alpha of 'big'; it must be a number"),
    "alpha is none": (set_field("lora_alpha", float("nan")), "an alpha of nan"),
    "pattern": (set_field("alpha_pattern", {"(": 3}), "the pattern '\\(', which is none"),
    "rank": (
        set_tensor("lora_A", torch.ones(9, 96)),
        r"tensors \[9, 96\] and \[96, 8\], which do not belong",
    ),
    "inputs": (set_tensor("lora_A", torch.ones(8, 95)), r"this model's matrix \[96, 96\]"),
    "outputs": (set_tensor("lora_B", torch.ones(95, 8)), r"\[95, 8\]"),
    "no matrix": (set_tensor("lora_A", torch.ones(())), r"tensors \[\] and"),
    "no rank": (set_tensor("lora_A", torch.ones(0, 96)), r"tensors \[0, 96\] and"),
    "no number": (set_tensor("lora_A", torch.full((8, 96), torch.nan)), "values that float32 has not"),
    "alone": (
        rename("base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight"),
        "only one of lora_A and",
    ),
    "layer": (
        rename("base_model.model.model.layers.7.self_attn.o_proj.lora_A.weight"),
        "layers.7.self_attn.o_pr",
    ),
    "head": (
        rename("base_model.model.lm_head.lora_A.weight"),
        "it has base_model.model.lm_head.lora_A.weight: only",
    ),
    "embedding": (
        rename("base_model.model.model.embed_tokens.lora_embedding_A"),
        "embed_tokens.lora_embedding_A",
    ),
    "huge alpha": (set_field("lora_alpha", 10**400), "it must be a number up to 1000000"),
    "twice": (
        lambda config, tensors: tensors.update({MODULE[17:] + ".lora_A.weight": torch.ones(8, 96)}),
        "it has model.layers.1.self_attn.o_proj twice",
    ),
    "huge": (
        lambda config, tensors: tensors.update({"junk": torch.ones(9_000_000)}),
        r"has \d+ bytes; this model's adapters have at most \d+ with rank 8",
    ),
    "nothing": (lambda config, tensors: tensors.clear(), "has no tensors"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder: Path = tmp_path_factory.mktemp("saved")
    write_adapters(folder, write_model(folder / "model", FAMILIES["llama2"]), adapter_configs("llama2"))
    return folder


@pytest.mark.parametrize("name", WRONG)
def test_what_the_model_cannot_have_is_refused_by_name(name, saved, tmp_path):
    change, message = WRONG[name]
    config = json.loads((saved / "all" / "adapter_config.json").read_text())
    tensors = load_file(saved / "all" / "adapter_model.safetensors")
    change(config, tensors)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=message):
        read_adapter(tmp_path, *read_model(saved / "model"), torch.float32, 8)


def test_limits_of_rank_and_type(saved):
    model = read_model(saved / "model")
    with pytest.raises(AdapterError, match="has rank 8; the setting max_lora_rank allows 7"):
        read_adapter(saved / "all", *model, torch.float32, 7)
    tensors = read_adapter(saved / "all", *model, torch.float32, 8)
    assert len(tensors) == 2 * 3 * 7


def test_what_has_been_read_is_independent_of_the_file(saved, tmp_path):
    """Which may be written anew, or cut, at any time."""
    for file in (saved / "all").iterdir():
        shutil.copy(file, tmp_path / file.name)
    model, file = read_model(saved / "model"), tmp_path / "adapter_model.safetensors"
    tensors = read_adapter(tmp_path, *model, torch.float32, 8)
    before = {name: values.copy() for name, values in tensors.items()}
    with file.open("r+b") as opened:
        opened.seek(file.stat().st_size // 2)
        opened.write(b"\xff" * 1000)
        opened.truncate()
    assert all((tensors[name] == before[name]).all() for name in before)
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors cannot be read"):
        read_adapter(tmp_path, *model, torch.float32, 8)
