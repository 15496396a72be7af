"""The embedding and the head, packed: one matrix where the model has one."""

from __future__ import annotations

import numpy as np
import torch
from numba import prange

from pagetide.ops.cpu.block import ROOM
from pagetide.ops.cpu.codes import join_codes, make_rounded, pack_codes, read_code_rows
from pagetide.ops.cpu.compiled import as_numpy, as_tensor, borrowed, device_function, kernel
from pagetide.ops.cpu.kept import Arrays, Keeper, no_keeper
from pagetide.ops.cpu.layers import activation_type
from pagetide.ops.cpu.matmul import project
from pagetide.ops.cpu.norm import normalize
from pagetide.ops.cpu.packing import GROUP, Packed, pack, packed_dense, read_rows
from pagetide.ops.cpu.sync import finish, make_sync, num_concurrent_threads
from pagetide.ops.layers import EmbeddingWeights
from pagetide.ops.weights import QuantizedWeight, Weight

_MOST_KEPT_ROWS = 256
_NO_BIAS = np.zeros(0, np.float32)


@kernel
def _logits(sync, num_rows, residual, norm, eps, normed, rounded, head, bias, out):  # type: ignore[no-untyped-def]
    for thread in prange(sync.shape[1]):
        arrays = borrowed((sync, residual, norm, normed, rounded, head, bias, out))
        _logits_thread(np.int64(thread), num_rows, eps, *arrays)


@device_function
def _logits_thread(thread, num_rows, eps, sync, residual, norm, normed, rounded, head, bias, out):  # type: ignore[no-untyped-def]
    normalize(sync, 0, thread, residual, num_rows, norm, eps, normed, head, 0, rounded)
    finish(sync, 0, thread)
    project(sync, 1, thread, normed, rounded, num_rows, head, 0, residual.shape[1], bias, False, None, out)


class CompiledEmbedding:
    """ops.layers.Embedding on a CPU."""

    def __init__(self, weights: EmbeddingWeights, keep: Keeper = no_keeper):
        self._vocab_size, self._hidden_size = weights.embedding.shape
        self._norm, self._eps = weights.norm.float().numpy(), np.float32(weights.eps)
        head = weights.embedding if weights.head is None else weights.head
        self._head = _packed_head(head, keep)
        self._columns = -(-self._vocab_size // GROUP) * GROUP
        self._embedding = None if weights.head is None else weights.embedding.dense()
        self._num_threads = num_concurrent_threads()
        self._logits = torch.empty(0)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        if self._embedding is not None:
            return self._embedding[ids].float()
        if self._head.is_quantized:
            return read_code_rows(self._head, self._hidden_size, ids)
        return read_rows(as_tensor(self._head.data[0]), self._hidden_size, ids)

    def logits(self, residual: torch.Tensor) -> torch.Tensor:
        head, rows = self._head, len(residual) + ROOM
        normed = np.empty((rows, self._hidden_size), activation_type(head))
        rounded = make_rounded(rows if head.is_quantized else 0, self._hidden_size)
        out = self._room(rows, self._columns)
        sync = make_sync(2, self._num_threads)
        _logits(
            sync,
            len(residual),
            residual.numpy(),
            self._norm,
            self._eps,
            normed,
            rounded,
            head,
            _NO_BIAS,
            out.numpy(),
        )
        return out[: len(residual), : self._vocab_size].contiguous()

    def _room(self, rows: int, columns: int) -> torch.Tensor:
        """The same memory for every usual step: fresh memory costs the kernel time for each page."""
        if rows > _MOST_KEPT_ROWS + ROOM:
            return torch.empty((rows, columns), dtype=torch.float32)
        if self._logits.numel() < rows * columns:
            self._logits = torch.empty(rows * columns, dtype=torch.float32)
        return self._logits[: rows * columns].view(rows, columns)


def _packed_head(weight: Weight, keep: Keeper) -> Packed:
    """As of one layer."""

    def make() -> Arrays:
        if isinstance(weight, QuantizedWeight):
            return join_codes([pack_codes(weight)])._asdict()
        return packed_dense(as_numpy(pack(weight.dense()))[None])._asdict()

    return Packed(**keep("head", make))
