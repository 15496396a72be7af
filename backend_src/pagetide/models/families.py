"""Which architectures the decoder runs, and what their weights are called. One row for each family."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from pagetide.models.config import DecoderConfig, Unsaid, UnsupportedModelError, read_config, read_json


@dataclass(frozen=True)
class Family:
    """Names of a layer's weights in the checkpoint; biases have the same name with .bias and are loaded
    where they exist.

    qkv, gate_up: matrices that become one, or the one that they are already. post_attention_norm,
    post_mlp_norm: of what is added to the residual, empty: there are none. norm_offset: added to all norms'
    weights. scales_embedding: by the root of the hidden size. exceeds_float16: what layers add up does.
    """

    unsaid: Unsaid = Unsaid()  # noqa: RUF009 (it is frozen)
    norm_offset: float = 0.0
    scales_embedding: bool = False
    exceeds_float16: bool = False
    embedding: str = "model.embed_tokens"
    layer: str = "model.layers.{}."
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    out: str = "self_attn.o_proj"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    post_attention_norm: str = ""
    post_mlp_norm: str = ""
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    kv_scales: tuple[str, str] = ("self_attn.k_scale", "self_attn.v_scale")
    final_norm: str = "model.norm"
    head: str = "lm_head"


_GEMMA2 = Family(  # arXiv:2408.00118
    unsaid=Unsaid(window_pattern=2, ties_embeddings=True),
    norm_offset=1.0,
    scales_embedding=True,
    exceeds_float16=True,
    mlp_norm="pre_feedforward_layernorm",
    post_attention_norm="post_attention_layernorm",
    post_mlp_norm="post_feedforward_layernorm",
)

FAMILIES = {
    "LlamaForCausalLM": Family(),  # Llama 2, 3, 3.x, SmolLM2
    "MistralForCausalLM": Family(),
    "Qwen2ForCausalLM": Family(),  # Qwen2, Qwen2.5: biases on QKV
    "Qwen3ForCausalLM": Family(Unsaid(qk_norm=True)),
    "Phi3ForCausalLM": Family(qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",)),  # Phi-3, 3.5, 4
    "SmolLM3ForCausalLM": Family(Unsaid(ties_embeddings=True)),
    "Gemma2ForCausalLM": _GEMMA2,
    "Gemma3ForCausalLM": replace(  # the text models
        _GEMMA2,
        unsaid=Unsaid(qk_norm=True, window_pattern=6, ties_embeddings=True, names_scaled_context=True),
    ),
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
            return FAMILIES[name], read_config(model, FAMILIES[name].unsaid)
    raise UnsupportedModelError(
        f"the architecture {', '.join(names) or '(none named)'} is not supported; known: "
        f"{', '.join(FAMILIES)}"
    )
