"""The quantized matrices of a GGUF file as codes, for engines that multiply them as they are: no rounding but
of the scales. Layouts: ggml's quantization blocks (github.com/ggml-org/ggml).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from pagetide.models.config import read_json
from pagetide.models.gguf import in_rotary_order, named_tensors

# codes uint8 [n, in], scales, minima float32 [n, groups]
_Parts = tuple[np.ndarray, np.ndarray, np.ndarray]


def convert_codes(file: Path, config: Path, target: Path) -> None:
    """Writes the matrices of a GGUF file whose kinds have codes of 4 or 8 bits: for module M, M.codes (uint8
    [out, in], or two in a byte), M.scales, M.minima (float32 [out, groups]) and M.bits.

    config: the file of the model that convert_gguf has written. target: a safetensors file.
    """
    from gguf import GGUFReader

    reader = GGUFReader(file)
    tensors = dict(_read_codes(reader, read_json(config)))
    save_file(tensors, target)


def _read_codes(reader: Any, config: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    for tensor, name in named_tensors(reader):
        kind = tensor.tensor_type.name
        if kind not in _KINDS or not name.endswith(".weight"):
            continue
        block_bytes, bits, unpack = _KINDS[kind]
        inputs, outputs = (int(size) for size in tensor.shape)
        parts = unpack(np.asarray(tensor.data).view(np.uint8).reshape(-1, block_bytes))
        codes, scales, minima = (
            in_rotary_order(torch.from_numpy(part).reshape(outputs, -1), tensor.name, config)
            for part in parts
        )
        assert codes.shape[1] == inputs
        module = name.removesuffix(".weight")
        yield f"{module}.codes", (codes if bits == 8 else codes[:, ::2] | codes[:, 1::2] << 4).contiguous()
        yield f"{module}.scales", scales.contiguous()
        yield f"{module}.minima", minima.contiguous()
        yield f"{module}.bits", torch.tensor(bits)


def _floats(blocks: np.ndarray, at: int) -> np.ndarray:
    """The float16 at this byte of each block: float32 [blocks, 1]."""
    return blocks[:, at : at + 2].copy().view(np.float16).astype(np.float32)


def _halves(data: np.ndarray) -> np.ndarray:
    """[blocks, n] to [blocks, 2 n]: all lower nibbles, then all upper ones."""
    return np.concatenate([data & 15, data >> 4], 1)


def _unpack_q4_0(blocks: np.ndarray) -> _Parts:
    scales = _floats(blocks, 0)
    return _halves(blocks[:, 2:]), scales, -8 * scales


def _unpack_q4_1(blocks: np.ndarray) -> _Parts:
    return _halves(blocks[:, 4:]), _floats(blocks, 0), _floats(blocks, 2)


def _unpack_q4_k(blocks: np.ndarray) -> _Parts:
    """256 elements in 8 groups, whose scales and minima are 6-bit multiples of the block's."""
    low, middle, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    factors = np.concatenate([low & 63, (high & 15) | (low >> 2 & 48)], 1)
    offsets = np.concatenate([middle & 63, (high >> 4) | (middle >> 2 & 48)], 1)
    codes = np.concatenate([_halves(blocks[:, at : at + 32]) for at in range(16, 144, 32)], 1)
    return codes, _floats(blocks, 0) * factors, -_floats(blocks, 2) * offsets


def _unpack_q6_k(blocks: np.ndarray) -> _Parts:
    """256 elements in 16 groups, whose scales are signed 8-bit multiples of the block's."""
    parts = []
    for half in range(2):
        low = blocks[:, 64 * half : 64 * half + 64]
        high = blocks[:, 128 + 32 * half : 160 + 32 * half]
        for quarter in range(4):
            nibbles = low[:, 32 * (quarter % 2) : 32 * (quarter % 2) + 32] >> 4 * (quarter // 2) & 15
            parts.append(nibbles | (high >> 2 * quarter & 3) << 4)
    scales = _floats(blocks, 208) * blocks[:, 192:208].view(np.int8)
    return np.concatenate(parts, 1) + np.uint8(128 - 32), scales, -128 * scales


def _unpack_q8_0(blocks: np.ndarray) -> _Parts:
    scales = _floats(blocks, 0)
    return blocks[:, 2:] ^ 128, scales, -128 * scales


# By ggml's name: bytes of a block, bits, and what takes blocks [n, bytes] apart.
_KINDS: dict[str, tuple[int, int, Callable[[np.ndarray], _Parts]]] = {
    "Q4_0": (18, 4, _unpack_q4_0),
    "Q4_1": (20, 4, _unpack_q4_1),
    "Q4_K": (144, 4, _unpack_q4_k),
    "Q6_K": (210, 8, _unpack_q6_k),
    "Q8_0": (34, 8, _unpack_q8_0),
}
