"""Packs matrices into the panels that tiles take; what is packed keeps no other copy."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numba import prange

from pagetide.ops.cpu.compiled import as_numpy, device_function, kernel, load
from pagetide.ops.cpu.tile_code import LANES
from pagetide.ops.cpu.tiles import depth_of

GROUP = 2 * LANES  # outputs that are computed at a time
NO_FORMS = np.zeros((0, 5), np.int64)  # of dense matrices


class Packed(NamedTuple):
    """A matrix of each layer, dense or quantized (codes.py)."""

    data: np.ndarray  # dense: bfloat16 (uint16) or float32 [layers, panels]; quantized: uint8, flat
    forms: np.ndarray  # int64 [layers, columns of codes.py]; dense: NO_FORMS

    @property
    def is_quantized(self) -> bool:
        return self.data.dtype == np.uint8


def packed_dense(data: np.ndarray) -> Packed:
    """Of [layers, panels]."""
    return Packed(data, NO_FORMS)


def pack(weight: torch.Tensor) -> torch.Tensor:
    """weight [n, k], bfloat16 or float32, to one dimension of panels [n / 16, k / depth, 16, depth]; n is
    filled up to whole groups with zeros.

    k is even where the weight is bfloat16.
    """
    depth = 2 if weight.dtype is torch.bfloat16 else 1
    filled = F.pad(weight, (0, 0, 0, -len(weight) % GROUP))
    return filled.view(-1, LANES, weight.shape[1] // depth, depth).transpose(1, 2).flatten()


def interleaved(gate_up: torch.Tensor) -> torch.Tensor:
    """[2 * size, ...], gate first, to 16 outputs of gate and 16 of up, in turn."""
    return gate_up.unflatten(0, (2, -1, LANES)).transpose(0, 1).flatten(0, 2)


@device_function
def place_of(n, k, size, depth):  # type: ignore[no-untyped-def]
    """Where element [n, k] of a matrix with `size` elements along k is packed."""
    return n // LANES * LANES * size + k // depth * LANES * depth + n % LANES * depth + k % depth


@kernel
def _read_rows(rows, weight, out):  # type: ignore[no-untyped-def]
    depth = depth_of(weight)
    for i in prange(rows.shape[0]):
        for k in range(out.shape[1]):
            out[i, k] = load(weight[place_of(rows[i], k, out.shape[1], depth)])


def read_rows(weight: torch.Tensor, size: int, rows: torch.Tensor) -> torch.Tensor:
    """Rows of a packed matrix [n, size] as float32 [len(rows), size]; rows int64."""
    out = torch.empty((len(rows), size), dtype=torch.float32)
    _read_rows(rows.numpy(), as_numpy(weight), out.numpy())
    return out
