"""Turns a GGUF file into a Hugging Face model directory, once: weights dequantized, tokenizer and chat template taken over."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from pagetide.models.config import UnsupportedModelError

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert_gguf(file: Path, target: Path) -> None:
    """Writes config, tokenizer and bfloat16 weights of a GGUF file into the folder target, which appears only when it is whole.

    Raises UnsupportedModelError.
    """
    unfinished = target.with_name(target.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    architecture = _write_config_and_tokenizer(file, unfinished)
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in _read_tensors(file, architecture, unfinished)}
    save_file(tensors, unfinished / "model.safetensors", metadata={"format": "pt"})
    unfinished.rename(target)


def _write_config_and_tokenizer(file: Path, target: Path) -> str:
    """Leaves the reading of GGUF's metadata to transformers; returns the GGUF architecture."""
    from transformers import AutoConfig, AutoTokenizer  # only needed here: the engine itself starts without it

    AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name).save_pretrained(str(target))
    config = AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name).to_dict()
    architecture = config["model_type"]
    if architecture not in ARCHITECTURES:
        raise UnsupportedModelError(f"{file.name} holds the architecture {architecture}; known in GGUF files: {', '.join(ARCHITECTURES)}")
    config["architectures"] = [ARCHITECTURES[architecture]]
    config["dtype"] = "bfloat16"
    config.pop("quantization_config", None)
    (target / "config.json").write_text(json.dumps(config, indent=2, default=str))
    return architecture


def _read_tensors(file: Path, architecture: str, target: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors under Hugging Face's names, float32."""
    from gguf import GGUFReader, dequantize

    config = json.loads((target / "config.json").read_bytes())
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for tensor in GGUFReader(file).tensors:
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", tensor.name)
        if match is None or match[2] not in _NAMES:
            continue  # tables that the decoder computes itself, such as rope_freqs
        layer, name, part = match.groups()
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if architecture == "llama" and name in heads:
            values = _restore_rotary_order(values, heads[name])
        prefix = "" if layer is None else f"model.layers.{layer}."
        yield f"{prefix}{_NAMES[name]}.{part}", values


def _restore_rotary_order(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Undoes llama.cpp's order of a head's rows: it keeps the pairs that rotate together side by side."""
    return weight.view(num_heads, -1, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)
