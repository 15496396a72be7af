"""The table of cosines and sines for rotary position embeddings, with the scaling rules of the Llama
family.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch

from pagetide.models.config import DecoderConfig, UnsupportedModelError


def rotary_table(config: DecoderConfig, max_len: int, device: torch.device) -> torch.Tensor:
    """float32 [max_len, head_dim]: head_dim/2 cosines, then as many sines (arXiv:2104.09864)."""
    frequencies, factor = _frequencies(config)
    angles = torch.outer(torch.arange(max_len, dtype=torch.float32), frequencies.float())
    return (torch.cat([angles.cos(), angles.sin()], dim=-1) * factor).to(device)


def _frequencies(config: DecoderConfig) -> tuple[torch.Tensor, float]:
    kind = config.rope["rope_type"]
    if kind == "default":
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
        return 1.0 / (
            config.rope["rope_theta"] ** exponents * torch.tensor(config.rope.get("factors", 1.0))
        ), 1.0
    from transformers.modeling_rope_utils import (
        ROPE_INIT_FUNCTIONS,
    )  # takes a second to import; most models do not scale

    if kind not in ROPE_INIT_FUNCTIONS or kind in ("dynamic", "longrope"):
        raise UnsupportedModelError(f"rope_type {kind} is not supported")
    return ROPE_INIT_FUNCTIONS[kind](_as_hf_config(config), torch.device("cpu"))


def _as_hf_config(config: DecoderConfig) -> SimpleNamespace:
    """What transformers' rope functions read of a model configuration."""
    return SimpleNamespace(
        rope_parameters=config.rope,
        head_dim=config.head_dim,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_heads,
        max_position_embeddings=config.max_position,
        standardize_rope_params=lambda: None,
    )
