"""Which architectures the decoder runs, and what their weights are called. One row for each family."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pagetide.models.config import DecoderConfig, UnsupportedModelError, read_config, read_json


@dataclass(frozen=True)
class Family:
    """Names of a layer's weights in the checkpoint; biases have the same name with .bias and are loaded
    where they exist.
    """

    qk_norm: bool = False
    embedding: str = "model.embed_tokens"
    layer: str = "model.layers.{}."
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    out: str = "self_attn.o_proj"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    kv_scales: tuple[str, str] = ("self_attn.k_scale", "self_attn.v_scale")
    final_norm: str = "model.norm"
    head: str = "lm_head"


FAMILIES = {
    "LlamaForCausalLM": Family(),  # Llama 2, 3, 3.x, SmolLM2
    "MistralForCausalLM": Family(),
    "Qwen2ForCausalLM": Family(),  # Qwen2, Qwen2.5: biases on QKV
    "Qwen3ForCausalLM": Family(qk_norm=True),
}


def read_model(model: Path) -> tuple[Family, DecoderConfig]:
    """Family and configuration of a Hugging Face model directory. Raises UnsupportedModelError."""
    raw = read_json(model / "config.json")
    if not raw:
        raise UnsupportedModelError(
            f"{model} has no config.json: give a Hugging Face model directory, a hub id, or a .gguf file"
        )
    names = raw.get("architectures") or []
    for name in names:
        if name in FAMILIES:
            return FAMILIES[name], read_config(model, FAMILIES[name].qk_norm)
    raise UnsupportedModelError(
        f"the architecture {', '.join(names) or '(none named)'} is not supported; known: "
        f"{', '.join(FAMILIES)}"
    )
