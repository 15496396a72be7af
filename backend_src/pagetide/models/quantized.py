"""Matrices that a checkpoint has quantized already, in the forms of GPTQ (arXiv:2210.17323), AWQ
(arXiv:2306.00978), compressed-tensors and FP8 checkpoints as Hugging Face's hub has them, and in the one that
gguf_codes.py writes.

What no kernel has codes for becomes codes of 8 bits, which are finer than any of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from pagetide.models.config import UnsupportedModelError
from pagetide.ops.weights import DenseWeight, QuantizedWeight, Weight, quantize

_MOST_INPUTS = 128  # that may share a scale: those of larger groups are given several
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where the outputs of a word's nibbles stand


class Raw(Protocol):
    """A checkpoint's tensors as they are in its files."""

    def __contains__(self, name: str) -> bool: ...

    def raw(self, name: str) -> torch.Tensor: ...


@dataclass(frozen=True)
class Scheme:
    """How a checkpoint is quantized.

    zero_shift: what is added to GPTQ's zero points. block: outputs and inputs that share a scale, where
    scales are of blocks. activation_bits: as QuantizedWeight's.
    """

    method: str
    zero_shift: int = 1
    block: tuple[int, int] | None = None
    activation_bits: int = 16


def read_scheme(raw: dict[str, Any]) -> Scheme | None:
    """From a model's config.json; None where nothing is quantized. Raises UnsupportedModelError."""
    settings = raw.get("quantization_config") or raw.get("compression_config")
    if not settings:
        return None
    method = settings.get("quant_method", "")
    if method not in _READERS:
        raise UnsupportedModelError(
            f"the checkpoint is quantized by {method or 'an unnamed method'}; known: {', '.join(_READERS)}, "
            "and GGUF files"
        )
    if method == "awq" and settings.get("version", "gemm") != "gemm":
        raise UnsupportedModelError(f"the checkpoint is AWQ's version {settings['version']}; known: gemm")
    groups = (settings.get("config_groups") or {}).values()
    blocks = [
        settings.get("weight_block_size"),
        *((group.get("weights") or {}).get("block_structure") for group in groups),
    ]
    block = next((tuple(each) for each in blocks if each), None)
    rounds_activations = any(
        (group.get("input_activations") or {}).get("num_bits") == 8
        and group["input_activations"].get("type", "int") == "int"
        for group in groups
    )
    return Scheme(
        method,
        zero_shift=0 if settings.get("checkpoint_format") == "gptq_v2" else 1,
        block=block,
        activation_bits=8 if rounds_activations else 16,
    )


def read_matrix(checkpoint: Raw, name: str, scheme: Scheme, dtype: torch.dtype) -> Weight:
    """The matrix of a module: quantized, or dense where the checkpoint has left it so. dtype: of what it
    stands for. Raises UnsupportedModelError.
    """
    found = _READERS[scheme.method](checkpoint, name, scheme)
    if found is None:
        return DenseWeight(checkpoint.raw(f"{name}.weight").to(dtype))
    if isinstance(found, torch.Tensor):
        found = quantized_to_8(found, name)
    return replace(found, dtype=dtype, activation_bits=scheme.activation_bits)


def quantized_to_8(values: torch.Tensor, name: str) -> QuantizedWeight:
    """Codes of 8 bits of any matrix. Raises UnsupportedModelError."""
    try:
        return quantize(values, 8)
    except ValueError as error:
        raise UnsupportedModelError(f"{name} cannot be quantized: {error}") from error


# What a reader returns: codes, values that become codes of 8 bits, or nothing where the module is not
# quantized.
_Found = QuantizedWeight | torch.Tensor | None


def from_groups(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int) -> _Found:
    """(code - zero) * scale of codes [out, in] in groups; scales, zeros [out, groups]."""
    return from_minima(codes, scales.float(), -zeros.float() * scales.float(), bits)


def from_minima(codes: torch.Tensor, scales: torch.Tensor, minima: torch.Tensor, bits: int) -> _Found:
    """code * scale + minimum, as codes that kernels have, or else as values."""
    group = codes.shape[1] // scales.shape[1]
    is_symmetric = bits == 8 and torch.equal(minima, -128 * scales)
    fits = next((size for size in (_MOST_INPUTS, 64, 32, 16) if group % size == 0), None)
    if fits is None or not (bits == 4 or is_symmetric):
        values = codes.unflatten(1, (-1, group)).float() * scales[..., None] + minima[..., None]
        return values.flatten(1)

    def kept(values: torch.Tensor) -> torch.Tensor:
        return values.bfloat16().float().repeat_interleave(group // fits, 1)

    scales = kept(scales)
    minima = -128 * scales if bits == 8 else kept(minima)
    return QuantizedWeight(codes, scales, minima, bits, torch.float32)


def _nibbles(words: torch.Tensor, bits: int = 4) -> torch.Tensor:
    """int32 [rows, words] to uint8 [rows, words * 32 / bits], the lowest bits first."""
    data = words.contiguous().view(torch.uint8)
    return data if bits == 8 else torch.stack([data & 15, data >> 4], -1).flatten(1)


def _bits_of(checkpoint: Raw, name: str, words: int, inputs: int) -> int:
    bits = 32 * words // inputs
    if bits not in (4, 8):
        raise UnsupportedModelError(f"{name} has codes of {bits} bits; known: 4 and 8")
    return bits


def _act_order(checkpoint: Raw, name: str, groups: int) -> torch.Tensor | None:
    """The group of each input, where groups are not of neighbours."""
    if name not in checkpoint or groups == 1:
        return None
    index = checkpoint.raw(name).long()
    in_order = torch.arange(len(index), device=index.device) // (len(index) // groups)
    return None if torch.equal(index, in_order) else index


def _read_gptq(checkpoint: Raw, name: str, scheme: Scheme) -> _Found:
    """qweight int32 [in / 8, out], qzeros [groups, out / 8], scales [groups, out], g_idx [in]: the group of
    each input.
    """
    if f"{name}.qweight" not in checkpoint:
        return None
    words, scales = checkpoint.raw(f"{name}.qweight").T, checkpoint.raw(f"{name}.scales").T.float()
    zeros = checkpoint.raw(f"{name}.qzeros")
    bits = _bits_of(checkpoint, name, zeros.shape[1], len(words))
    codes = _nibbles(words, bits)
    zeros = (_nibbles(zeros, bits).T.int() + scheme.zero_shift) & (2**bits - 1)
    index = _act_order(checkpoint, f"{name}.g_idx", scales.shape[1])
    if index is not None:
        return (codes.float() - zeros[:, index]) * scales[:, index]
    return from_groups(codes, scales, zeros, bits)


def _read_awq(checkpoint: Raw, name: str, scheme: Scheme) -> _Found:
    """qweight int32 [in, out / 8], qzeros [groups, out / 8], scales [groups, out]."""
    if f"{name}.qweight" not in checkpoint:
        return None

    def unpacked(words: torch.Tensor) -> torch.Tensor:
        return _nibbles(words).unflatten(1, (-1, 8))[..., _AWQ_ORDER].flatten(1).T.contiguous()

    scales = checkpoint.raw(f"{name}.scales").T.float()
    codes, zeros = (unpacked(checkpoint.raw(f"{name}.{part}")) for part in ("qweight", "qzeros"))
    return from_groups(codes, scales, zeros, 4)


def _read_compressed(checkpoint: Raw, name: str, scheme: Scheme) -> _Found:
    """weight_packed int32 [out, in / 8], or weight int8 or FP8; weight_scale [out, groups], [out, 1] or one;
    weight_zero_point as signed as the codes, packed along the outputs.
    """
    if f"{name}.weight_packed" not in checkpoint:
        return _read_scaled(checkpoint, name, scheme)
    outputs, inputs = checkpoint.raw(f"{name}.weight_shape").tolist()
    words, scales = checkpoint.raw(f"{name}.weight_packed"), checkpoint.raw(f"{name}.weight_scale").float()
    bits = _bits_of(checkpoint, name, words.shape[1], inputs)
    codes = _nibbles(words, bits)[:, :inputs].contiguous()
    zeros = torch.full_like(scales, 2 ** (bits - 1))
    if f"{name}.weight_zero_point" in checkpoint:
        zeros = _nibbles(checkpoint.raw(f"{name}.weight_zero_point").T, bits)[:, :outputs].T.float()
    index = _act_order(checkpoint, f"{name}.weight_g_idx", scales.shape[1])
    if index is not None:
        return (codes.float() - zeros[:, index]) * scales[:, index]
    return from_groups(codes, scales, zeros, bits)


def _read_scaled(checkpoint: Raw, name: str, scheme: Scheme) -> _Found:
    """weight int8 or FP8 [out, in]; weight_scale, or weight_scale_inv as DeepSeek calls it: one for all, for
    each output, for groups of inputs, or for blocks.
    """
    values = checkpoint.raw(f"{name}.weight")
    part = next((p for p in ("weight_scale", "weight_scale_inv") if f"{name}.{p}" in checkpoint), None)
    if part is None:
        return None
    scales = checkpoint.raw(f"{name}.{part}").float()
    scales = scales.reshape(-1, 1) if scales.dim() < 2 else scales
    if values.dtype is torch.int8 and len(scales) in (1, len(values)):
        scales = scales.expand(len(values), -1)
        return from_groups(values.view(torch.uint8) ^ 128, scales, torch.full_like(scales, 128), 8)
    outputs, inputs = values.shape
    rows, columns = -(-outputs // len(scales)), -(-inputs // scales.shape[1])
    if scheme.block and scales.numel() > 1:
        rows, columns = scheme.block
    whole = scales.repeat_interleave(rows, 0)[:outputs].repeat_interleave(columns, 1)[:, :inputs]
    return values.float() * whole


def _read_codes(checkpoint: Raw, name: str, scheme: Scheme) -> _Found:
    """codes uint8 [out, in], or [out, in / 2] with the even inputs in the lower half; scales, minima [out,
    groups].
    """
    if f"{name}.codes" not in checkpoint:
        return None
    codes = checkpoint.raw(f"{name}.codes")
    scales, minima = (checkpoint.raw(f"{name}.{part}").float() for part in ("scales", "minima"))
    bits = int(checkpoint.raw(f"{name}.bits"))
    return from_minima(codes if bits == 8 else _nibbles(codes), scales, minima, bits)


_READERS: dict[str, Callable[[Raw, str, Scheme], _Found]] = {
    "gptq": _read_gptq,
    "awq": _read_awq,
    "compressed-tensors": _read_compressed,
    "fp8": _read_scaled,
    "codes": _read_codes,
}
