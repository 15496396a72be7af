"""Reads LoRA adapters (arXiv:2106.09685) as PEFT writes them: a folder with adapter_config.json and
adapter_model.safetensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load

from pagetide.models.config import DecoderConfig, read_json
from pagetide.models.families import Family
from pagetide.ops.adapters import LayerAdapter, LowRank

_MAX_ALPHA = 10**6
_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"
_NAME = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<part>A|B)(?:\.\w+)?\.weight")


class AdapterError(ValueError):
    """A folder holds no adapter that this model can have; the message says why."""


def adapter_version(folder: Path) -> str:
    """Another one when the files have been written anew. Raises AdapterError."""
    try:
        states = [(folder / name).stat() for name in (_CONFIG, _TENSORS)]
    except OSError as error:
        raise AdapterError(f"{error.filename} cannot be read: {error.strerror}") from error
    return "/".join(f"{state.st_mtime_ns}.{state.st_size}.{state.st_ino}" for state in states)


def read_adapter(
    folder: Path, family: Family, config: DecoderConfig, dtype: torch.dtype, max_rank: int
) -> dict[str, np.ndarray]:
    """The tensors of an adapter by "MODULE.down", float32 [rank, in], and "MODULE.up" [out, rank], scaled.

    dtype: in which they will be kept, whose range they must not exceed. Raises AdapterError.
    """
    scales = _Scales(_read_config(folder))
    sizes = module_sizes(family, config)
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in _read_tensors(folder / _TENSORS, sizes, max_rank).items():
        match = _NAME.fullmatch(name)
        if match is None or match["module"] not in sizes:
            raise AdapterError(
                f"it has {name}: only the matrices of attention and MLP of this model's layers can be adapted"
            )
        parts, part = found.setdefault(match["module"], {}), {"A": "down", "B": "up"}[match["part"]]
        if part in parts:
            raise AdapterError(f"it has {match['module']} twice, once as {name}")
        parts[part] = tensor.float().numpy()
    if not found:
        raise AdapterError(f"{_TENSORS} has no tensors")
    tensors = {}
    for module, parts in found.items():
        _check(module, parts, sizes[module], max_rank)
        scaled = {"down": parts["down"], "up": parts["up"] * scales.of(module, len(parts["down"]))}
        for part, values in scaled.items():
            if not np.isfinite(torch.from_numpy(values).to(dtype).float().numpy()).all():
                raise AdapterError(f"{module} has values that {str(dtype).removeprefix('torch.')} has not")
            tensors[f"{module}.{part}"] = values
    return tensors


def _read_tensors(file: Path, sizes: dict[str, tuple[int, int]], max_rank: int) -> dict[str, torch.Tensor]:
    """In memory of their own: the file may change at any time."""
    # In float32, with room for names.
    most = sum(4 * max_rank * sum(size) + 1000 for size in sizes.values())
    try:
        if (size := file.stat().st_size) > most:
            raise AdapterError(
                f"{_TENSORS} has {size} bytes; this model's adapters have at most {most} with rank "
                f"{max_rank} (max_lora_rank)"
            )
        return load(file.read_bytes())
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{_TENSORS} cannot be read: {error}") from error


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / _TENSORS).is_file():
        raise AdapterError(f"it has no {_TENSORS} (files of other formats could run code, and are not read)")
    try:
        raw = read_json(folder / _CONFIG)
    except (OSError, ValueError) as error:
        raise AdapterError(f"{_CONFIG} cannot be read: {error}") from error
    kind = raw.get("peft_type") if isinstance(raw, dict) else None
    if kind != "LORA":
        raise AdapterError(f"{_CONFIG} says peft_type {kind!r}; it must be 'LORA'")
    # What changes more, or otherwise, than products of low rank do.
    unknown = {
        "use_dora": raw.get("use_dora"),
        "fan_in_fan_out": raw.get("fan_in_fan_out"),
        "modules_to_save": raw.get("modules_to_save"),
        "bias": raw.get("bias", "none") != "none",
        "lora_bias": raw.get("lora_bias"),
        "layer_replication": raw.get("layer_replication"),
        "trainable_token_indices": raw.get("trainable_token_indices"),
    }
    for name, is_used in unknown.items():
        if is_used:
            raise AdapterError(f"{_CONFIG} uses {name}, which is not supported")
    return raw


class _Scales:
    """What products of low rank are multiplied by."""

    def __init__(self, config: Mapping[str, Any]):
        self._alpha = config.get("lora_alpha", 8)
        patterns = config.get("alpha_pattern")
        self._alphas: Mapping[str, Any] = patterns if isinstance(patterns, dict) else {}
        self._takes_root = bool(config.get("use_rslora"))  # arXiv:2312.03732
        for alpha in (self._alpha, *self._alphas.values()):
            if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) <= _MAX_ALPHA:
                raise AdapterError(
                    f"{_CONFIG} has an alpha of {alpha!r:.40}; it must be a number up to {_MAX_ALPHA}"
                )

    def of(self, module: str, rank: int) -> np.float32:
        pattern = next((name for name in self._alphas if _matches(name, module)), None)
        alpha = self._alpha if pattern is None else self._alphas[pattern]
        return np.float32(alpha / (math.sqrt(rank) if self._takes_root else rank))


def _matches(pattern: str, module: str) -> bool:
    """As PEFT understands it: a module's name or the end of it, or an expression for that."""
    try:
        return re.fullmatch(rf"(?:.*\.)?(?:{pattern})", module) is not None
    except re.error as error:
        raise AdapterError(f"{_CONFIG} has the pattern {pattern!r}, which is none: {error}") from error


def _check(module: str, parts: dict[str, np.ndarray], size: tuple[int, int], max_rank: int) -> None:
    if len(parts) != 2:
        raise AdapterError(f"{module} has only one of lora_A and lora_B")
    down, up = parts["down"], parts["up"]
    (outputs, inputs), rank = size, down.shape[0] if down.ndim == 2 else 0
    if not rank or down.shape[1] != inputs or up.shape != (outputs, rank):
        raise AdapterError(
            f"{module} has tensors {list(down.shape)} and {list(up.shape)}, which do not belong to this "
            f"model's matrix [{outputs}, {inputs}]"
        )
    if rank > max_rank:
        raise AdapterError(f"{module} has rank {rank}; the setting max_lora_rank allows {max_rank}")


def module_sizes(family: Family, config: DecoderConfig) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of each matrix that can be adapted, by its name in a checkpoint."""
    return {
        family.layer.format(index) + name: size
        for index in range(config.num_layers)
        for name, size in _layer_sizes(family, config).items()
    }


def _layer_sizes(family: Family, config: DecoderConfig) -> dict[str, tuple[int, int]]:
    """The same of any layer, by names within it."""
    queries, kept = (count * config.head_dim for count in (config.num_heads, config.num_kv_heads))
    hidden, width = config.hidden_size, config.intermediate_size
    qkv = [queries, kept, kept] if len(family.qkv) == 3 else [queries + 2 * kept]
    gate_up = [width, width] if len(family.gate_up) == 2 else [2 * width]
    sizes = {name: (outputs, hidden) for name, outputs in zip(family.qkv, qkv, strict=True)}
    sizes |= {name: (outputs, hidden) for name, outputs in zip(family.gate_up, gate_up, strict=True)}
    return sizes | {family.out: (hidden, queries), family.down: (hidden, width)}


def layer_adapter(
    tensors: Mapping[str, np.ndarray], index: int, family: Family, config: DecoderConfig
) -> LayerAdapter:
    """What an adapter (read_adapter) adds to one layer; matrices that have become one, as one."""
    prefix, sizes = family.layer.format(index), _layer_sizes(family, config)

    def joined(*names: str) -> LowRank | None:
        parts = {name: _low_rank(tensors, prefix + name) for name in names}
        downs = [part.down for part in parts.values() if part]
        if not downs:
            return None
        # Each has columns of its own, and nothing in those of the others.
        ups = [part.up if part else torch.zeros((sizes[name][0], 0)) for name, part in parts.items()]
        return LowRank(torch.cat(downs), torch.block_diag(*ups))

    return LayerAdapter(joined(*family.qkv), joined(family.out), joined(*family.gate_up), joined(family.down))


def _low_rank(tensors: Mapping[str, np.ndarray], module: str) -> LowRank | None:
    if f"{module}.down" not in tensors:
        return None
    down, up = (torch.from_numpy(tensors[f"{module}.{part}"]) for part in ("down", "up"))
    return LowRank(down, up)
