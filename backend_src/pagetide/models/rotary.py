"""The tables of cosines and sines for rotary position embeddings, with the scaling rules of the families."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from pagetide.models.config import DecoderConfig, UnsupportedModelError


def rotary_tables(config: DecoderConfig, max_len: int, device: torch.device) -> torch.Tensor:
    """float32 [len(config.ropes), max_len, head_dim]: head_dim/2 cosines, then as many sines
    (arXiv:2104.09864). What does not turn comes last in each half (in_halves).
    """
    return torch.stack([_table(config, rope, max_len) for rope in config.ropes]).to(device)


def rotary_size(rope: dict[str, Any], head_dim: int) -> int:
    """How many elements of a head turn."""
    return int(head_dim * rope.get("partial_rotary_factor", 1.0))


def in_halves(heads: torch.Tensor, size: int) -> torch.Tensor:
    """Queries' and keys' elements in an order in which those that turn together are half a head apart, though
    only the first `size` of a head turn. heads [n, head_dim, ...]; their products stay as they are.
    """
    head_dim = heads.shape[1]
    at = torch.arange(head_dim, device=heads.device)
    half, rest = size // 2, (head_dim - size) // 2
    low = torch.cat([at[:half], at[size : size + rest]])
    high = torch.cat([at[half:size], at[size + rest :]])
    return heads[:, torch.cat([low, high])]


def _table(config: DecoderConfig, rope: dict[str, Any], max_len: int) -> torch.Tensor:
    angles, factor = torch.zeros(max_len, config.head_dim // 2), 1.0
    turned = rotary_size(rope, config.head_dim) // 2
    if rope["rope_type"] != "none":
        frequencies, factor = _frequencies(config, rope, max_len)
        angles[:, :turned] = torch.outer(torch.arange(max_len, dtype=torch.float32), frequencies.float())
    cos, sin = angles.cos(), angles.sin()
    cos[:, :turned] *= factor
    sin[:, :turned] *= factor
    return torch.cat([cos, sin], dim=-1)


def _frequencies(config: DecoderConfig, rope: dict[str, Any], max_len: int) -> tuple[torch.Tensor, float]:
    kind, size = rope["rope_type"], rotary_size(rope, config.head_dim)
    if kind == "default":
        exponents = torch.arange(0, size, 2, dtype=torch.int64).float() / size
        return 1.0 / (rope["rope_theta"] ** exponents * torch.tensor(rope.get("factors", 1.0))), 1.0
    from transformers.modeling_rope_utils import (
        ROPE_INIT_FUNCTIONS,
    )  # takes a second to import; most models do not scale

    if kind not in ROPE_INIT_FUNCTIONS or kind in ("dynamic", "proportional"):
        raise UnsupportedModelError(f"rope_type {kind} is not supported")
    # LongRoPE (arXiv:2402.13753) has factors for short and for long texts; one cache cannot have both, so
    # what may become long is taken as long from the start.
    return ROPE_INIT_FUNCTIONS[kind](_as_hf_config(config, rope), torch.device("cpu"), seq_len=max_len)


def _as_hf_config(config: DecoderConfig, rope: dict[str, Any]) -> SimpleNamespace:
    """What transformers' rope functions read of a model configuration."""
    return SimpleNamespace(
        rope_parameters=rope,
        head_dim=config.head_dim,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_heads,
        max_position_embeddings=config.max_position,
        standardize_rope_params=lambda: None,
    )
