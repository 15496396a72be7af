"""The shape of a decoder, whatever file it came from. Frozen."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class UnsupportedModelError(ValueError):
    """The model needs something that the decoder does not have; the message says what."""


# Of gated MLPs: what Hugging Face's files call those that the kernels have.
ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu"}


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes in elements. windows: for each layer the tokens that a token sees, 0: all.

    ropes: rope parameters as Hugging Face names them, rope_type "none" where positions turn nothing;
    rope_of_layer: which of them each layer has. activation: of the gated MLP, "silu" or "gelu" (its
    approximation by tanh). query_size, soft_cap: as HeadShape's; logit_soft_cap: what logits cannot exceed.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    norm_eps: float
    ropes: tuple[dict[str, Any], ...]
    rope_of_layer: tuple[int, ...]
    windows: tuple[int, ...]
    tie_embeddings: bool
    qk_norm: bool
    end_ids: frozenset[int]
    pad_id: int
    activation: str = "silu"
    query_size: float = 0.0
    soft_cap: float = 0.0
    logit_soft_cap: float = 0.0


def read_json(file: Path) -> dict[str, Any]:
    """The object in a file; an empty one where there is no such file. Raises ValueError."""
    return json.loads(file.read_bytes()) if file.exists() else {}


@dataclass(frozen=True)
class Unsaid:
    """What a family's files may leave out. window_pattern: every so many layers see all, 0: none does.
    names_scaled_context: max_position_embeddings is what the scaling of angles has brought, and not what it
    began with.
    """

    qk_norm: bool = False
    window_pattern: int = 0
    ties_embeddings: bool = False
    names_scaled_context: bool = False


def read_config(model: Path, unsaid: Unsaid) -> DecoderConfig:
    """The configuration in a Hugging Face model directory. Raises UnsupportedModelError."""
    raw = read_json(model / "config.json")
    heads = raw["num_attention_heads"]
    end_ids = _end_ids(model, raw)
    windows = _windows(raw, unsaid.window_pattern)
    ropes, rope_of_layer = _ropes(raw, windows)
    max_position = raw["max_position_embeddings"]
    if not unsaid.names_scaled_context:
        max_position = _scaled_context(max_position, ropes[0])
    pad_id = raw.get("pad_token_id")
    return DecoderConfig(
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
        max_position=max_position,
        norm_eps=raw["rms_norm_eps"],
        ropes=ropes,
        rope_of_layer=rope_of_layer,
        windows=tuple(window if window < max_position else 0 for window in windows),
        tie_embeddings=raw.get("tie_word_embeddings", unsaid.ties_embeddings),
        qk_norm=unsaid.qk_norm,
        end_ids=end_ids,
        pad_id=pad_id if isinstance(pad_id, int) else min(end_ids, default=0),
        activation=_activation(raw),
        query_size=raw.get("query_pre_attn_scalar") or 0.0,
        soft_cap=raw.get("attn_logit_softcapping") or 0.0,
        logit_soft_cap=raw.get("final_logit_softcapping") or 0.0,
    )


def _activation(raw: dict[str, Any]) -> str:
    name = raw.get("hidden_activation") or raw.get("hidden_act", "silu")
    if name not in ACTIVATIONS:
        raise UnsupportedModelError(f"hidden_act is {name}, only {', '.join(ACTIVATIONS)} are supported")
    return ACTIVATIONS[name]


def _end_ids(model: Path, raw: dict[str, Any]) -> frozenset[int]:
    """All tokens that some file of the model calls its end: models differ in which of them is right, and
    none is an answer's text.
    """
    told = [
        raw.get("eos_token_id"),
        read_json(model / "generation_config.json").get("eos_token_id"),
        _end_of_tokenizer(model),
    ]
    ids = [token for one in told if one is not None for token in (one if isinstance(one, list) else [one])]
    return frozenset(token for token in ids if isinstance(token, int) and 0 <= token < raw["vocab_size"])


def _end_of_tokenizer(model: Path) -> int | None:
    settings = read_json(model / "tokenizer_config.json")
    token = settings.get("eos_token")
    text = token.get("content") if isinstance(token, dict) else token
    if not text:
        return None
    for number, added in (settings.get("added_tokens_decoder") or {}).items():
        if added.get("content") == text:
            return int(number)
    added_tokens = read_json(model / "tokenizer.json").get("added_tokens") or ()
    return next((added["id"] for added in added_tokens if added["content"] == text), None)


def _scaled_context(named: int, rope: dict[str, Any]) -> int:
    """The context that the model was made for; files that scale an earlier one by YaRN, or evenly, often
    name only that.
    """
    if rope["rope_type"] not in ("yarn", "linear"):
        return named
    original = rope.get("original_max_position_embeddings") or named
    return max(named, int(original * rope.get("factor", 1.0)))


def _ropes(
    raw: dict[str, Any], windows: tuple[int, ...]
) -> tuple[tuple[dict[str, Any], ...], tuple[int, ...]]:
    """Rope parameters in one form, and which of them each layer has: older files have rope_theta and
    rope_scaling, newer ones rope_parameters; some models have others where a window is, some turn nothing in
    some layers.
    """
    told = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    whole, local = told, None
    if "full_attention" in told:
        whole, local = told["full_attention"], told.get("sliding_attention")
    elif raw.get("rope_local_base_freq"):
        local = {"rope_theta": raw["rope_local_base_freq"]}
    ropes = [_rope(raw, whole)]
    if local is not None:
        return (ropes[0], _rope(raw, local)), tuple(int(window > 0) for window in windows)
    turns = raw.get("no_rope_layers")  # despite the name, 1 says that a layer turns
    if turns is None and raw.get("no_rope_layer_interval"):
        turns = [(layer + 1) % raw["no_rope_layer_interval"] for layer in range(len(windows))]
    if turns and not all(turns):
        return (ropes[0], {"rope_type": "none"}), tuple(int(not turn) for turn in turns)
    return (ropes[0],), (0,) * len(windows)


def _rope(raw: dict[str, Any], told: dict[str, Any]) -> dict[str, Any]:
    rope = dict(told)
    rope.setdefault("rope_theta", raw.get("rope_theta", 10000.0))
    kind = rope.get("rope_type") or rope.get("type") or "default"
    rope["rope_type"] = "longrope" if kind == "su" else kind  # what the first files with it called it
    for name in ("partial_rotary_factor", "original_max_position_embeddings"):
        if raw.get(name):
            rope.setdefault(name, raw[name])
    if raw.get("rope_factors"):
        rope["factors"] = raw["rope_factors"]  # from a GGUF file: each frequency is divided by its own
    return rope


def _windows(raw: dict[str, Any], pattern: int) -> tuple[int, ...]:
    num_layers, window = raw["num_hidden_layers"], raw.get("sliding_window") or 0
    if not window or raw.get("use_sliding_window") is False:
        return (0,) * num_layers
    if kinds := raw.get("layer_types"):
        return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
    if pattern := raw.get("sliding_window_pattern") or pattern:
        return tuple(window if (layer + 1) % pattern else 0 for layer in range(num_layers))
    first = raw.get("max_window_layers", 0) if raw.get("use_sliding_window") else 0
    return tuple(window if layer >= first else 0 for layer in range(num_layers))
