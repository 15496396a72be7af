"""Matrices that a checkpoint has quantized already, in the forms of GPTQ (arXiv:2210.17323), AWQ
(arXiv:2306.00978), compressed-tensors and FP8 checkpoints as Hugging Face's hub has them, and in the one that
gguf_codes.py writes.

What no kernel has codes for is read as what it stands for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from pagetide.models.config import UnsupportedModelError, read_json
from pagetide.ops.weights import DenseWeight, Fp8Weight, QuantizedWeight, Weight

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


def read_scheme(model: Path) -> Scheme | None:
    """From the files of a model directory; None where nothing is quantized. Raises UnsupportedModelError."""
    config = read_json(model / "config.json")
    settings = config.get("quantization_config") or config.get("compression_config")
    if not settings and (older := read_json(model / "quantize_config.json")):  # AutoGPTQ's own file
        settings = {"quant_method": "gptq", **older}
    if not settings:
        return None
    method = settings.get("quant_method", "")
    known = _READERS.keys() - {"codes"}
    if method not in known:
        raise UnsupportedModelError(
            f"the checkpoint is quantized by {method or 'an unnamed method'}; known: "
            f"{', '.join(sorted(known))}, and GGUF files"
        )
    for key, values in _VARIANTS.get(method, {}).items():
        if str(settings.get(key) or values[0]).lower() not in values:
            raise UnsupportedModelError(
                f"the checkpoint's {method} {key} is {settings[key]}; known: {', '.join(values)}"
            )
    if settings.get("transform_config"):
        raise UnsupportedModelError("the checkpoint rotates activations (transform_config): not supported")
    groups = (settings.get("config_groups") or {}).values()
    blocks = [
        settings.get("weight_block_size"),
        *((group.get("weights") or {}).get("block_structure") for group in groups),
    ]
    activations = [group.get("input_activations") or {} for group in groups]
    rounds_all = bool(activations) and all(
        each.get("num_bits") == 8 and each.get("type", "int") == "int" for each in activations
    )
    return Scheme(
        method,
        zero_shift=0 if settings.get("checkpoint_format") == "gptq_v2" else 1,
        block=next(((int(each[0]), int(each[1])) for each in blocks if each), None),
        activation_bits=8 if rounds_all else 16,
    )


# What may stand in a checkpoint's settings, the first where they say nothing.
_VARIANTS = {
    "gptq": {"checkpoint_format": ("gptq", "gptq_v2")},
    "awq": {"version": ("gemm",)},
    "compressed-tensors": {
        "format": ("pack-quantized", "int-quantized", "naive-quantized", "float-quantized", "dense")
    },
}


def read_matrix(checkpoint: Raw, name: str, scheme: Scheme, dtype: torch.dtype) -> Weight:
    """The matrix of a module: codes where kernels have such, and else dense. dtype: of what it stands for.
    Raises UnsupportedModelError.
    """
    try:
        found = _READERS[scheme.method](checkpoint, name, scheme)
    except (RuntimeError, IndexError, ValueError) as error:
        if isinstance(error, UnsupportedModelError):
            raise
        raise UnsupportedModelError(
            f"{name} is not laid out as in {scheme.method} checkpoints: {error}"
        ) from error
    if found is None:
        return DenseWeight(as_dense(checkpoint, f"{name}.weight").to(dtype))
    if isinstance(found, torch.Tensor):
        return DenseWeight(found.to(dtype))
    if isinstance(found, Fp8Weight):
        return replace(found, dtype=dtype)
    return replace(found, dtype=dtype, activation_bits=scheme.activation_bits)


def as_dense(checkpoint: Raw, name: str) -> torch.Tensor:
    """A tensor of numbers that need no scale. Raises UnsupportedModelError for others."""
    tensor = checkpoint.raw(name)
    if tensor.dtype.itemsize == 1:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise UnsupportedModelError(
            f"{name} is of type {kind}, and the checkpoint does not say how it is quantized"
        )
    return tensor


# What a reader returns: a quantized matrix, values where no kernel has such codes, or nothing where the
# module is not quantized.
_Found = QuantizedWeight | Fp8Weight | torch.Tensor | None


def from_groups(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int) -> _Found:
    """(code - zero) * scale of codes [out, in] in groups; scales, zeros [out, groups]."""
    exact, kept = scales.float(), scales.bfloat16().float()
    found = from_minima(codes, kept, -zeros.float() * kept, bits)  # so that what is zero stays near it
    if isinstance(found, QuantizedWeight):
        return found
    return from_minima(codes, exact, -zeros.float() * exact, bits)


def from_minima(codes: torch.Tensor, scales: torch.Tensor, minima: torch.Tensor, bits: int) -> _Found:
    """code * scale + minimum, as codes that kernels have, or else as values."""
    if codes.shape[1] % scales.shape[1]:
        raise ValueError(f"{codes.shape[1]} inputs are no {scales.shape[1]} groups")
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


def _of_outputs(scales: torch.Tensor, outputs: int) -> torch.Tensor:
    """Scales of all, of each output or of groups: [outputs, groups]."""
    scales = scales.float()
    scales = scales.reshape(-1, 1) if scales.dim() < 2 else scales
    return scales.expand(outputs, -1) if len(scales) == 1 else scales


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
    in_order = torch.arange(len(index), device=index.device) // max(len(index) // groups, 1)
    is_unused = bool((index < 0).any())
    return None if is_unused or torch.equal(index, in_order) else index


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
    words = checkpoint.raw(f"{name}.weight_packed")
    scales = _of_outputs(checkpoint.raw(f"{name}.weight_scale"), outputs)
    bits = _bits_of(checkpoint, name, words.shape[1], inputs)
    codes = _nibbles(words, bits)[:, :inputs].contiguous()
    zeros = _compressed_zeros(checkpoint, name, scales, bits)
    index = _act_order(checkpoint, f"{name}.weight_g_idx", scales.shape[1])
    if index is not None:
        return (codes.float() - zeros[:, index]) * scales[:, index]
    return from_groups(codes, scales, zeros, bits)


def _compressed_zeros(checkpoint: Raw, name: str, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """As large as scales, for codes from 0 on: packed along the outputs, or signed (in older ones, and of 8
    bits)."""
    if f"{name}.weight_zero_point" not in checkpoint:
        return torch.full_like(scales, 2 ** (bits - 1))
    zeros = checkpoint.raw(f"{name}.weight_zero_point")
    if zeros.dtype is torch.int32 and zeros.shape != scales.shape:
        return _nibbles(zeros.T, bits)[:, : len(scales)].T.float()
    return _of_outputs(zeros, len(scales)) + 2 ** (bits - 1)


def _read_scaled(checkpoint: Raw, name: str, scheme: Scheme) -> _Found:
    """weight int8 or FP8 [out, in]; weight_scale, or weight_scale_inv as DeepSeek calls it: one for all, for
    each output, for groups of inputs, or for blocks.
    """
    values = checkpoint.raw(f"{name}.weight")
    part = next((p for p in ("weight_scale", "weight_scale_inv") if f"{name}.{p}" in checkpoint), None)
    if part is None or values.dtype.itemsize > 1:  # of a module that is dense, or made dense again
        return None
    outputs, inputs = values.shape
    scales = checkpoint.raw(f"{name}.{part}")
    if values.dtype is torch.int8:
        scales = _of_outputs(scales, outputs)
        return from_groups(
            values.view(torch.uint8) ^ 128, scales, _compressed_zeros(checkpoint, name, scales, 8), 8
        )
    if scheme.block and scales.shape == (-(-outputs // scheme.block[0]), -(-inputs // scheme.block[1])):
        rows, columns = scheme.block
    else:
        scales = _of_outputs(scales, outputs) if scales.dim() < 2 or len(scales) == 1 else scales
        rows, columns = -(-outputs // len(scales)), -(-inputs // scales.shape[1])
    of_rows = scales.float().repeat_interleave(rows, 0)[:outputs]
    if values.dtype is torch.float8_e4m3fn and inputs == columns * scales.shape[1]:
        return Fp8Weight(values, of_rows, torch.float32)
    return values.float() * of_rows.repeat_interleave(columns, 1)[:, :inputs]


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
