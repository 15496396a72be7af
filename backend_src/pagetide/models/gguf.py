"""Turns a GGUF file into a Hugging Face model directory, once: weights dequantized, tokenizer and chat
template taken over.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pagetide.models.config import UnsupportedModelError
from pagetide.models.pretokenizers import use_pretokenizer

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
    """Writes config, tokenizer and bfloat16 weights of a GGUF file into the folder target.

    Raises UnsupportedModelError, OSError.
    """
    from gguf import GGUFReader  # only needed for GGUF files

    reader = GGUFReader(file)
    _write_config(file, reader, target)
    _write_tokenizer(file, reader, target)
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in _read_tensors(reader, target)}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


def _value(reader: Any, key: str) -> Any:
    """What the file says under this key, None if it says nothing."""
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _write_tokenizer(file: Path, reader: Any, target: Path) -> None:
    """Leaves the vocabulary to transformers, but not the rule by which texts are split, which it does not
    look at.
    """
    from transformers import AutoTokenizer  # only needed here: the engine itself starts without it

    AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name).save_pretrained(str(target))
    if (name := _value(reader, "tokenizer.ggml.pre")) is not None and _value(
        reader, "tokenizer.ggml.model"
    ) == "gpt2":
        written = target / "tokenizer.json"
        tokenizer = json.loads(written.read_bytes())
        use_pretokenizer(tokenizer, name)
        written.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")


def _write_config(file: Path, reader: Any, target: Path) -> None:
    """Leaves most of GGUF's metadata to transformers."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name).to_dict()
    architecture = config["model_type"]
    if architecture not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{file.name} holds the architecture {architecture}; known in GGUF files: "
            f"{', '.join(ARCHITECTURES)}"
        )
    config["architectures"] = [ARCHITECTURES[architecture]]
    config["dtype"] = "bfloat16"
    config.pop("quantization_config", None)
    config["eos_token_id"] = _end_ids(reader)
    _add_rope_scaling(config, reader, _value(reader, "general.architecture"))
    (target / "config.json").write_text(json.dumps(config, indent=2, default=str))


def _end_ids(reader: Any) -> list[int]:
    """The end of a text, and the end of a turn, which is another token in many chat models."""
    found = [_value(reader, f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    return sorted({int(token) for token in found if token is not None})


def _add_rope_scaling(config: dict[str, Any], reader: Any, architecture: str) -> None:
    """Rope scaling by type, and by a factor for each frequency, which is how GGUF says what Llama 3.x does.

    Raises UnsupportedModelError.
    """
    from gguf import dequantize

    kind = _value(reader, f"{architecture}.rope.scaling.type") or "none"
    if kind not in ("none", "linear", "yarn"):
        raise UnsupportedModelError(
            f"{architecture}.rope.scaling.type is {kind!r}, which is not supported; none, linear and yarn are"
        )
    if kind != "none":
        rope = {"rope_theta": _value(reader, f"{architecture}.rope.freq_base") or 10000.0, "rope_type": kind}
        names = {
            "factor": "factor",
            "original_context_length": "original_max_position_embeddings",
            "attn_factor": "attention_factor",
        }
        for theirs, ours in names.items():
            if (value := _value(reader, f"{architecture}.rope.scaling.{theirs}")) is not None:
                rope[ours] = value
        config["rope_parameters"] = rope
    for tensor in reader.tensors:
        if tensor.name == "rope_freqs.weight":
            config["rope_factors"] = dequantize(tensor.data, tensor.tensor_type).tolist()


def named_tensors(reader: Any) -> Iterator[tuple[Any, str]]:
    """The file's tensors with their names in a Hugging Face checkpoint."""
    for tensor in reader.tensors:
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", tensor.name)
        if match is None or match[2] not in _NAMES:
            continue  # tables that the decoder computes itself
        layer, name, part = match.groups()
        prefix = "" if layer is None else f"model.layers.{layer}."
        yield tensor, f"{prefix}{_NAMES[name]}.{part}"


def _read_tensors(reader: Any, target: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors under Hugging Face's names, float32."""
    from gguf import dequantize

    config = json.loads((target / "config.json").read_bytes())
    for tensor, name in named_tensors(reader):
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        yield name, in_rotary_order(values, tensor.name, config)


def in_rotary_order(values: torch.Tensor, name: str, config: dict[str, Any]) -> torch.Tensor:
    """Undoes llama.cpp's order of a head's rows in Llama models: it keeps the pairs that rotate together side
    by side. name: the tensor's in the file.
    """
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    kind = name.split(".")[-2]
    if config["model_type"] != "llama" or kind not in heads:
        return values
    return values.view(heads[kind], -1, 2, *values.shape[1:]).transpose(1, 2).reshape(values.shape)
