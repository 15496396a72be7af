"""A decoder's tensors by the names of its checkpoint: read from safetensors files, or made up to measure
with.
"""

from __future__ import annotations

import math
import zlib
from abc import ABC, abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open

from pagetide.models.config import DecoderConfig, UnsupportedModelError, read_json
from pagetide.models.families import Family
from pagetide.models.quantized import Scheme, as_dense, read_matrix, read_scheme
from pagetide.ops.weights import (
    DenseWeight,
    QuantizedWeight,
    Weight,
    quantize,
    quantize_fp8,
    rearranged,
    stacked,
)


def _files(model: Path) -> list[Path]:
    """The checkpoint's files: those of its index, if it has one, since others may be left over from another
    checkpoint.
    """
    index = model / "model.safetensors.index.json"
    if index.exists():
        files = [model / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    else:
        files = (
            [model / "model.safetensors"]
            if (model / "model.safetensors").exists()
            else sorted(model.glob("*.safetensors"))
        )
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise UnsupportedModelError(
            f"{model} lacks {', '.join(missing)}, which model.safetensors.index.json names"
        )
    if not files:
        raise UnsupportedModelError(f"{model} has no .safetensors files")
    return files


class Tensors(Protocol):
    """What a decoder asks for while it is made; names as in a Hugging Face checkpoint."""

    def has(self, module: str) -> bool:
        """Whether there is a module of this name."""

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the device and in the type of the engine. Raises UnsupportedModelError."""

    def read_scale(self, name: str) -> float:
        """A number; 1 where there is none of this name. Raises UnsupportedModelError if it is no scale."""

    def read_weight(self, names: tuple[str, ...]) -> Weight:
        """The matrices of these modules as one, with the outputs of all."""

    def read_bias(self, names: tuple[str, ...]) -> torch.Tensor | None:
        """Their biases as one; None if there are none."""

    def read_table(self, name: str, rows: int, is_head: bool) -> Weight:
        """The first rows of the matrix of a module that has one row for each token."""


class Checkpoint:
    """The tensors of a Hugging Face model directory, read from disk when they are asked for.

    Every tensor comes in the given dtype, on the given device; matrices that are quantized stay so.

    codes: the file of a GGUF file's quantized matrices (gguf_codes.py), to use in place of the dense ones.
    Raises UnsupportedModelError.
    """

    def __init__(self, model: Path, dtype: torch.dtype, device: torch.device, codes: Path | None = None):
        self._dtype = dtype
        self._device = device
        self._scheme = Scheme("codes") if codes else read_scheme(model)
        self._file_of = {}
        for file in [*_files(model), *([codes] if codes else [])]:
            opened = safe_open(str(file), framework="pt")
            for name in opened.keys():  # noqa: SIM118 (safe_open is no dict)
                self._file_of[name] = opened
        self._modules = {name.rpartition(".")[0] for name in self._file_of}
        if self._scheme == Scheme("gptq") and not any(name.endswith(".qweight") for name in self._file_of):
            self._scheme = None  # AutoGPTQ's file has been left over beside dense weights

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def raw(self, name: str) -> torch.Tensor:
        """As it is in the file. Raises UnsupportedModelError."""
        if name not in self:
            raise UnsupportedModelError(f"the checkpoint has no tensor called {name}")
        return self._file_of[name].get_tensor(name).to(self._device)

    @property
    def is_quantized(self) -> bool:
        """Whether some of its matrices may be."""
        return self._scheme is not None

    def has(self, module: str) -> bool:
        return module in self._modules

    def read(self, name: str) -> torch.Tensor:
        return as_dense(self, name).to(self._dtype)

    def read_scale(self, name: str) -> float:
        if name not in self:
            return 1.0
        found = self.raw(name).float()
        if found.numel() != 1 or not 0 < float(found) < math.inf:
            raise UnsupportedModelError(
                f"{name} is no positive number, as the scale of a layer's cache must be"
            )
        return float(found)

    def read_weight(self, names: tuple[str, ...]) -> Weight:
        return stacked([self._read_matrix(name) for name in names])

    def read_bias(self, names: tuple[str, ...]) -> torch.Tensor | None:
        if f"{names[0]}.bias" not in self:
            return None
        return torch.cat([self.read(f"{name}.bias") for name in names])

    def read_table(self, name: str, rows: int, is_head: bool) -> Weight:
        return rearranged(self._read_matrix(name), lambda values: values[:rows])

    def _read_matrix(self, name: str) -> Weight:
        if self._scheme is None:
            return DenseWeight(self.read(f"{name}.weight"))
        return read_matrix(self, name, self._scheme, self._dtype)


class RandomTensors:
    """Random matrices of a model's shapes, norms of one and no biases: as fast as the real ones."""

    def __init__(self, family: Family, config: DecoderConfig, dtype: torch.dtype, device: torch.device):
        self._dtype, self._device = dtype, device
        hidden, head_dim = config.hidden_size, config.head_dim
        attended, kept = config.num_heads * head_dim, config.num_kv_heads * head_dim
        qkv = [(attended, hidden), (kept, hidden), (kept, hidden)]
        gate_up = [(config.intermediate_size, hidden)] * 2
        post_norms = [name for name in (family.post_attention_norm, family.post_mlp_norm) if name]
        layer = {
            **dict(zip(family.qkv, _as_many(qkv, family.qkv), strict=True)),
            family.out: (hidden, attended),
            **dict(zip(family.gate_up, _as_many(gate_up, family.gate_up), strict=True)),
            family.down: (hidden, config.intermediate_size),
            **dict.fromkeys((family.attention_norm, family.mlp_norm, *post_norms), (hidden,)),
            **dict.fromkeys((family.q_norm, family.k_norm), (head_dim,)),
        }
        self._shapes: dict[str, tuple[int, ...]] = {
            f"{family.layer.format(index)}{name}": shape
            for index in range(config.num_layers)
            for name, shape in layer.items()
        }
        self._shapes |= {family.embedding: (config.vocab_size, hidden), family.final_norm: (hidden,)}
        if not config.tie_embeddings:
            self._shapes[family.head] = (config.vocab_size, hidden)

    def has(self, module: str) -> bool:
        return module in self._shapes

    def read(self, name: str) -> torch.Tensor:
        tensor = torch.empty(
            self._shapes[name.removesuffix(".weight")], dtype=self._dtype, device=self._device
        )
        # Made from its name, so that all ranks have parts of one model.
        noise = torch.Generator(self._device).manual_seed(zlib.crc32(name.encode()))
        return tensor.fill_(1) if tensor.dim() == 1 else tensor.normal_(0, 0.02, generator=noise)

    def read_scale(self, name: str) -> float:
        return 1.0

    def read_weight(self, names: tuple[str, ...]) -> Weight:
        return stacked([DenseWeight(self.read(name)) for name in names])

    def read_bias(self, names: tuple[str, ...]) -> torch.Tensor | None:
        return None

    def read_table(self, name: str, rows: int, is_head: bool) -> Weight:
        return DenseWeight(self.read(name)[:rows])


def _as_many(shapes: list[tuple[int, int]], names: tuple[str, ...]) -> list[tuple[int, int]]:
    """The shapes [out, in], or, where a family has one matrix in their place, its shape."""
    return shapes if len(names) > 1 else [(sum(rows for rows, _ in shapes), shapes[0][1])]


class _RoundedAtLoad(ABC):
    """The tensors of another, with its matrices in another form."""

    def __init__(self, tensors: Tensors, rounds_head: bool):
        self._tensors, self._rounds_head = tensors, rounds_head

    def has(self, module: str) -> bool:
        return self._tensors.has(module)

    def read(self, name: str) -> torch.Tensor:
        return self._tensors.read(name)

    def read_scale(self, name: str) -> float:
        return self._tensors.read_scale(name)

    def read_weight(self, names: tuple[str, ...]) -> Weight:
        return self._rounded(self._tensors.read_weight(names), names[0], is_head=False)

    def read_bias(self, names: tuple[str, ...]) -> torch.Tensor | None:
        return self._tensors.read_bias(names)

    def read_table(self, name: str, rows: int, is_head: bool) -> Weight:
        table = self._tensors.read_table(name, rows, is_head)
        return self._rounded(table, name, is_head) if is_head and self._rounds_head else table

    @abstractmethod
    def _rounded(self, weight: Weight, name: str, is_head: bool) -> Weight:
        """The matrix of the module, or of several that begin with it. Raises UnsupportedModelError."""


class Fp8AtLoad(_RoundedAtLoad):
    """The tensors of another, with the dense matrices of its layers as FP8; those that are codes stay so."""

    def __init__(self, tensors: Tensors):
        super().__init__(tensors, rounds_head=False)

    def _rounded(self, weight: Weight, name: str, is_head: bool) -> Weight:
        return quantize_fp8(weight.values) if isinstance(weight, DenseWeight) else weight


class QuantizedAtLoad(_RoundedAtLoad):
    """The tensors of another, with all matrices of its layers as codes, so that one kernel has them: those
    that are dense are rounded to so many bits, and if rounds_head is set the head's to 8.

    activation_bits: as QuantizedWeight's; None: as the checkpoint has it.
    """

    def __init__(self, tensors: Tensors, bits: int, activation_bits: int | None, rounds_head: bool):
        super().__init__(tensors, rounds_head)
        self._bits, self._activation_bits = bits, activation_bits

    def _rounded(self, weight: Weight, name: str, is_head: bool) -> Weight:
        """Codes stay as they are, but for those of fewer bits than were asked for: files of mixed kinds know
        what needs more.
        """
        bits = 8 if is_head else self._bits
        is_kept = isinstance(weight, QuantizedWeight) and (
            self._activation_bits is None or weight.bits >= bits
        )
        if not is_kept:
            try:
                weight = quantize(weight.dense(), bits)
            except ValueError as error:
                raise UnsupportedModelError(f"{name} cannot be quantized: {error}") from error
        assert isinstance(weight, QuantizedWeight)
        return replace(weight, activation_bits=self._activation_bits or weight.activation_bits)
