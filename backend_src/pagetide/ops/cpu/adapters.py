"""Low-rank adapters (LoRA, arXiv:2106.09685) on a CPU: what a token's adapter adds to a matrix product is
up @ (down @ x), of matrices packed as the model's own.

Each phase that multiplies by a matrix has one before it, in which the rows of all tokens are multiplied by
`down` of each adapter that some token has; of the result, `hidden`, those of other tokens are cleared, so
that `up` may add to all rows. A token's sums are in the same order whatever others have.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from pagetide.ops.adapters import MATRICES, AdapterRoom, LayerAdapter, LowRank
from pagetide.ops.cpu.block import DENSE_ROWS, SCRATCH_ROWS, multiply_block
from pagetide.ops.cpu.compiled import as_numpy, device_function
from pagetide.ops.cpu.packing import GROUP, NO_FORMS, Packed, interleaved, pack
from pagetide.ops.cpu.sync import take
from pagetide.ops.cpu.vectors import clear, scale


class Adapters(NamedTuple):
    """All adapters that lie beside the model, and who has them in this step.

    Matrices: [layers * adapters, packed], of ranks in whole 32s. Types and dimensions are those of the
    model's own matrices and activations, so that the same code is compiled for both.
    """

    num_adapters: int
    rows: int  # of hidden that each has
    of_token: np.ndarray  # int64 [t], -1: none
    active: np.ndarray  # int64 [a]: those that some token has
    parts: np.ndarray  # int64 [a, 2]: the rows among which these tokens are, in whole tiles
    hidden: np.ndarray  # [active * rows, largest rank], in the activations' type
    forms: np.ndarray  # of Packed
    qkv_down: np.ndarray
    qkv_up: np.ndarray
    out_down: np.ndarray
    out_up: np.ndarray
    gate_up_down: np.ndarray
    gate_up_up: np.ndarray
    down_down: np.ndarray
    down_up: np.ndarray


class Added(NamedTuple):
    """What adapters add to one matrix of one layer. down, up: of all layers; first: the first of this one;
    size: inputs.
    """

    adapters: Adapters
    down: Packed
    up: Packed
    first: int
    size: int
    rank: int


@device_function
def added_to(adapters, layer, size, down, up):  # type: ignore[no-untyped-def]
    """down, up: one of Adapters' pairs, of a matrix with `size` inputs."""
    forms, first, rank = adapters.forms, layer * adapters.num_adapters, down.shape[1] // size
    return Added(adapters, Packed(down, forms), Packed(up, forms), first, size, rank)


@device_function
def shrink(sync, phase, thread, sums, x, rounded, num_rows, added):  # type: ignore[no-untyped-def]
    """added.adapters.hidden = x [m, size] @ down.T. sums: as project_gated's."""
    adapters, size, rank = added.adapters, added.size, added.rank
    groups, blocks = rank // GROUP, (num_rows + SCRATCH_ROWS - 1) // SCRATCH_ROWS
    num_tasks = adapters.active.shape[0] * groups * blocks
    task = take(sync, phase, thread, num_tasks)
    while task >= 0:
        which, column = task // (groups * blocks), task // blocks % groups * GROUP
        first, adapter = task % blocks * SCRATCH_ROWS, adapters.active[which]
        last = min(first + SCRATCH_ROWS, adapters.parts[which, 1])
        first = max(first, adapters.parts[which, 0])
        matrix = added.first + adapter
        if first < last:
            multiply_block(x, rounded, first, last, added.down, matrix, size, column, False, sums, 0, GROUP)
        for row in range(first, last):
            at = (which * adapters.rows + row) * rank + column
            if adapters.of_token[row] == adapter:
                scale(sums, (row - first) * GROUP, np.float32(1), GROUP, adapters.hidden, at)
            else:
                clear(adapters.hidden, at, GROUP)
        task = take(sync, phase, thread, num_tasks)


@device_function
def expand(added, rounded, first, last, column, out, out_at, out_stride):  # type: ignore[no-untyped-def]
    """out [rows, 32] += what adapters add to the rows [first, last), outputs from `column` on; out_at: where
    out's first row begins.
    """
    adapters, rank = added.adapters, added.rank
    for which in range(adapters.active.shape[0]):
        low, high = max(first, adapters.parts[which, 0]), min(last, adapters.parts[which, 1])
        if low < high:
            at, to = which * adapters.rows, out_at + (low - first) * out_stride
            rows, matrix = (at + low, at + high), added.first + adapters.active[which]
            multiply_block(
                adapters.hidden, rounded, *rows, added.up, matrix, rank, column, True, out, to, out_stride
            )


class AdapterMemory:
    """The matrices of all adapters. sizes: (outputs, inputs) of each of MATRICES; dtype: bfloat16 or float32,
    as the model's; activations: the type of what is multiplied, uint16 (bfloat16) or float32.
    """

    def __init__(
        self,
        room: AdapterRoom,
        num_layers: int,
        sizes: dict[str, tuple[int, int]],
        dtype: torch.dtype,
        activations: type[np.generic],
    ):
        self._count, self._dtype, self._activations = room.count, dtype, activations
        self._matrices: dict[str, torch.Tensor] = {}
        self._ranks = {name: -(-room.rank_of(name) // GROUP) * GROUP for name in MATRICES}
        for name, (outputs, inputs) in sizes.items():
            rank, filled = self._ranks[name], -(-outputs // GROUP) * GROUP
            for part, elements in (("down", rank * inputs), ("up", filled * rank)):
                shape = (num_layers * room.count, elements)
                self._matrices[f"{name}_{part}"] = torch.zeros(shape, dtype=dtype)
        self._hidden = np.zeros((0, max(self._ranks.values())), activations)
        self._views: dict[str, Any] = {name: as_numpy(values) for name, values in self._matrices.items()}
        self._of_none = self._of(np.zeros(0, np.int64), 0)

    def set(self, adapter: int, layers: Iterable[LayerAdapter]) -> None:
        """Takes the place of what has been there."""
        for index, layer in enumerate(layers):
            at = index * self._count + adapter
            for name in MATRICES:
                added: LowRank | None = getattr(layer, name)
                for part in ("down", "up"):
                    place = self._matrices[f"{name}_{part}"][at]
                    if added is None:
                        place.zero_()
                    else:
                        place.copy_(self._packed(added, name, part))

    def _packed(self, added: LowRank, name: str, part: str) -> torch.Tensor:
        missing = self._ranks[name] - len(added.down)
        if part == "down":
            return pack(F.pad(added.down, (0, 0, 0, missing)).to(self._dtype))
        up = F.pad(added.up, (0, missing))
        return pack((interleaved(up) if name == "gate_up" else up).to(self._dtype))

    def of_step(self, of_token: torch.Tensor | None, rows: int) -> Adapters:
        """What kernels take. of_token: Batch.adapters; rows: as the other activations have."""
        return self._of_none if of_token is None else self._of(of_token.numpy(), rows)

    def _of(self, tokens: np.ndarray, rows: int) -> Adapters:
        active = np.unique(tokens[tokens >= 0])
        parts = [_part(np.flatnonzero(tokens == adapter), len(tokens)) for adapter in active]
        room, rank = self._hidden.shape
        if room < len(active) * rows:
            self._hidden = np.zeros((len(active) * rows, rank), self._activations)
        pairs = np.array(parts, np.int64).reshape(-1, 2)
        return Adapters(self._count, rows, tokens, active, pairs, self._hidden, NO_FORMS, **self._views)


def _part(rows: np.ndarray, num_rows: int) -> tuple[int, int]:
    """From the first of some rows to behind the last, in whole tiles."""
    first, last = int(rows[0]), int(rows[-1])
    return first // DENSE_ROWS * DENSE_ROWS, min((last // DENSE_ROWS + 1) * DENSE_ROWS, num_rows)
