"""Small random-weight models of every family, written as Hugging Face directories, and transformers as
their reference.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pagetide.llm import LLM
from pagetide.types import SamplingParams
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

if TYPE_CHECKING:
    from peft import PeftModel

SIZES: dict[str, Any] = {
    "vocab_size": 199,
    "hidden_size": 96,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": 5,
    "bos_token_id": 1,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

LARGE_HEADS = {**SIZES, "num_attention_heads": 3, "num_key_value_heads": 1}
# 24 of a head's 32 elements turn.
PHI4_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}

FAMILIES: dict[str, PretrainedConfig] = {
    "llama2": LlamaConfig(**SIZES),
    "llama3.1": LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True),
    "llama-biases": LlamaConfig(**SIZES, attention_bias=True),
    "smollm2": LlamaConfig(
        **{**SIZES, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 288},
        tie_word_embeddings=True,
    ),
    "mistral": MistralConfig(**SIZES, sliding_window=None, head_dim=16),
    "mistral-window": MistralConfig(**SIZES, sliding_window=24, head_dim=16),
    "qwen2.5": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    "phi3": Phi3Config(**SIZES),
    "phi4-mini": Phi3Config(**LARGE_HEADS, rope_parameters=PHI4_ROPE, tie_word_embeddings=True),
    "smollm3": SmolLM3Config(**SIZES, no_rope_layer_interval=2, tie_word_embeddings=True),
    "gemma2": Gemma2Config(
        **SIZES,
        head_dim=16,
        sliding_window=24,
        query_pre_attn_scalar=10,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=4.0,
    ),
    "gemma3": Gemma3TextConfig(
        **SIZES,
        head_dim=16,
        sliding_window=24,
        query_pre_attn_scalar=16,
        sliding_window_pattern=2,
        rope_parameters=GEMMA3_ROPE,
    ),
    "sizes that no kernel takes": LlamaConfig(**{**SIZES, "hidden_size": 60}),
}


def write_model(folder: Path, config: PretrainedConfig, shards: bool = False) -> Any:
    """Writes a random model of this configuration into the folder; returns transformers' copy in float32."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Far from zero and one, so that a forgotten bias or norm weight shows.
            parameter.copy_(
                torch.randn_like(parameter) * (0.5 if parameter.dim() == 1 else 0.15) + (parameter.dim() == 1)
            )
    model.save_pretrained(folder, max_shard_size="100KB" if shards else "5GB")
    return model


def greedy(model: Any, prompt: list[int], num_tokens: int) -> list[int]:
    """transformers' greedy continuation; ends with an end token."""
    ids = torch.tensor([prompt])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=num_tokens
    )
    return output[0, len(prompt) :].tolist()


def write_adapters(folder: Path, model: Any, configs: dict[str, dict[str, Any]]) -> PeftModel:
    """Writes random LoRA adapters for a model of transformers, whose layers PEFT replaces: one folder for
    each name, with the fields of its LoraConfig. Returns PEFT's model, which has them all.
    """
    # It imports the Triton language, which then asks whether it is to be interpreted (interpreted.py).
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    wrapped: Any = None
    for name, fields in configs.items():
        config = LoraConfig(task_type="CAUSAL_LM", **fields)
        if wrapped is None:
            wrapped = get_peft_model(model, config, adapter_name=name)
        else:
            wrapped.add_adapter(name, config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    wrapped.eval()
    for name in configs:
        wrapped.save_pretrained(folder / "saved", selected_adapters=[name])
        (folder / "saved" / name).rename(folder / name)
    return wrapped


def adapter_configs(name: str) -> dict[str, dict[str, Any]]:
    """LoRA adapters of every kind for a family: of all matrices, of few of them with another scale, and of
    one layer's with ranks and scales of their own.
    """
    is_fused = name.startswith("phi")
    every = (
        ["qkv_proj", "gate_up_proj"] if is_fused else ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]
    )
    every += ["o_proj", "down_proj"]
    some = ["qkv_proj"] if is_fused else ["q_proj", "v_proj"]
    patterns = {"rank_pattern": {"o_proj": 11}, "alpha_pattern": {"o_proj": 22}}
    return {
        "all": {"r": 8, "lora_alpha": 16, "target_modules": every},
        "some": {"r": 3, "lora_alpha": 5, "target_modules": some, "use_rslora": True},
        "patterns": {
            "r": 4,
            "lora_alpha": 4,
            "target_modules": every,
            "layers_to_transform": [1],
            **patterns,
        },
    }


def expected_of(wrapped: PeftModel, adapter: str, prompt: list[int], num_tokens: int) -> list[int]:
    """PEFT's greedy continuation. adapter: empty for none."""
    if not adapter:
        with wrapped.disable_adapter():
            return greedy(wrapped, prompt, num_tokens)
    wrapped.set_adapter(adapter)
    return greedy(wrapped, prompt, num_tokens)


def check_adapters(
    folder: Path, name: str, config: PretrainedConfig, num_tokens: int, **settings: Any
) -> None:
    """Every prompt with every adapter, and without one, all in one batch, against PEFT."""
    wrapped = write_adapters(
        folder / "adapters", write_model(folder / "model", config), adapter_configs(name)
    )
    chooser = random.Random(1)
    prompts = [list(range(20, 60)), *(chooser.choices(range(6, 199), k=k) for k in (1, 33))]
    asked = [(prompt, adapter) for prompt in prompts for adapter in ("", *adapter_configs(name))]
    llm = LLM(
        str(folder / "model"), dtype="float32", lora_dir=str(folder / "adapters"), check_integrity=True,
        cache_dir=str(folder / "cache"), max_num_batched_tokens=48, **settings,
    )  # fmt: skip
    results = llm.generate(
        [prompt for prompt, _ in asked],
        SamplingParams(temperature=0, max_tokens=num_tokens),
        lora_name=[adapter for _, adapter in asked],
    )
    llm.close()
    found = [result.outputs[0].token_ids for result in results]
    for (prompt, adapter), tokens in zip(asked, found, strict=True):
        assert tokens == expected_of(wrapped, adapter, prompt, num_tokens), adapter
    assert len({tuple(tokens) for tokens in found[:4]}) == 4, "adapters that change nothing prove nothing"
