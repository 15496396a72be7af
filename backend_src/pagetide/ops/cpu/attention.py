"""Paged attention straight on the KV blocks (float32 or bfloat16), sums in float32, online softmax (arXiv:1805.02867).

A task is one (sequence, KV head, tile of queries): all query heads of the group that share the KV head are rows of one small matrix, so that
keys and values are read once for the whole group. Long chunks go to torch's flash attention, which has the larger tiles they want.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numba import prange

from pagetide.ops.attention import LayerAttention, TorchAttention
from pagetide.ops.batch import Batch
from pagetide.ops.cpu.compiled import as_numpy, device_function, fast_exp, kernel, store
from pagetide.ops.cpu.vectors import make_scores, make_weighted_sum

_TILE = 16  # queries of a task
_LONGEST = 64  # chunks with more tokens go to torch
_MINUS_INFINITY = np.float32(-3.0e38)


@dataclass(frozen=True)
class NumbaPlan:
    """tasks int64 [num_tasks, 4]: sequence, KV head, first token in the step, number of queries. Arrays are shared with the batch's tensors.

    long_chunks: (first token, sequence) for torch.
    """

    tasks: np.ndarray
    block_table: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    long_chunks: list[tuple[int, int]]


class NumbaAttention(TorchAttention):
    """One kernel for decode and short chunks; TorchAttention's way for long ones."""

    def plan(self, batch: Batch) -> NumbaPlan:  # type: ignore[override]
        counts = batch.counts.astype(np.int64)
        first = np.cumsum(counts) - counts
        is_long = counts > _LONGEST
        short = np.flatnonzero(~is_long)
        num_tiles = -(-counts[short] // _TILE)
        sequences = np.repeat(short, num_tiles)
        offset = (np.arange(len(sequences)) - np.repeat(np.cumsum(num_tiles) - num_tiles, num_tiles)) * _TILE
        queries = np.minimum(counts[sequences] - offset, _TILE)
        cost = (batch.starts[sequences] + offset + 64) * queries
        heads = self._shape.num_kv_heads
        tasks = np.empty((len(sequences), heads, 4), np.int64)
        tasks[..., 0], tasks[..., 2], tasks[..., 3] = sequences[:, None], (first[sequences] + offset)[:, None], queries[:, None]
        tasks[..., 1] = np.arange(heads)
        return NumbaPlan(
            tasks=spread(tasks.reshape(-1, 4), np.repeat(cost, heads)),
            block_table=batch.block_table.numpy(),
            positions=batch.positions.numpy(),
            slots=batch.slot_mapping.numpy(),
            long_chunks=[(int(first[i]), int(i)) for i in np.flatnonzero(is_long)],
        )

    def write(self, qkv: torch.Tensor, kv: torch.Tensor, layer: LayerAttention, batch: Batch) -> torch.Tensor:
        shape, plan = self._shape, batch.attention
        q = torch.empty((qkv.shape[0], shape.num_heads, shape.head_dim), dtype=torch.float32)
        has_norm = layer.q_norm is not None and layer.k_norm is not None
        norms = (layer.q_norm.numpy(), layer.k_norm.numpy()) if has_norm else (_NO_NORM, _NO_NORM)  # type: ignore[union-attr]
        positions = (plan.slots, plan.positions, layer.cos_sin.numpy())
        _write(len(q), qkv.numpy(), as_numpy(kv), *positions, *norms, has_norm, np.float32(layer.eps), q.numpy())
        return q

    def attend(self, q: torch.Tensor, kv: torch.Tensor, layer: LayerAttention, batch: Batch) -> torch.Tensor:
        out, plan = torch.empty_like(q), batch.attention
        if len(plan.tasks):
            scale = np.float32(self._shape.head_dim**-0.5)
            attend = make_attend(self._shape.group, self._shape.head_dim, kv.shape[3] // self._shape.head_dim)
            attend(q.numpy(), as_numpy(kv), plan.tasks, plan.block_table, plan.positions, layer.window, scale, out.numpy())
        for first, sequence in plan.long_chunks:
            self._attend_chunk(q, kv, layer, batch, first, sequence, out)
        return out.flatten(1)


_NO_NORM = np.zeros(0, np.float32)


def spread(tasks: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """The tasks in an order in which contiguous shares cost about the same: each thread takes one such share."""
    order = np.argsort(-cost, kind="stable")
    return np.ascontiguousarray(np.concatenate([tasks[order[0::2]], tasks[order[1::2]]]))


@kernel
def _write(num_tokens, qkv, kv, slots, positions, cos_sin, q_norm, k_norm, has_norm, eps, q):  # type: ignore[no-untyped-def]
    """QK-norm, rotary and the write into the cache, one pass. qkv [t, (H + 2K) * D], kv [blocks, 2, K, block_size * D], q [t, H, D]."""
    num_heads, head_dim = q.shape[1], q.shape[2]
    num_kv_heads, block_size = kv.shape[2], kv.shape[3] // head_dim
    for token in prange(num_tokens):
        block, offset = slots[token] // block_size, slots[token] % block_size
        turn = cos_sin[positions[token]]
        rotated = np.empty(head_dim, np.float32)
        for head in range(num_heads + num_kv_heads):
            source = qkv[token, head * head_dim : (head + 1) * head_dim]
            is_query = head < num_heads
            _rotate(source, turn, q_norm if is_query else k_norm, has_norm, eps, rotated)
            if is_query:
                q[token, head, :] = rotated
            else:
                keys = kv[block, 0, head - num_heads]
                for i in range(head_dim):
                    store(keys, i * block_size + offset, rotated[i])
        for head in range(num_kv_heads):
            source = qkv[token, (num_heads + num_kv_heads + head) * head_dim :]
            values = kv[block, 1, head]
            for i in range(head_dim):
                store(values, offset * head_dim + i, source[i])


@device_function
def _rotate(source, turn, norm, has_norm, eps, out):  # type: ignore[no-untyped-def]
    size = out.shape[0]
    half = size // 2
    scale = np.float32(1)
    if has_norm:
        squares = np.float32(0)
        for i in range(size):
            squares += source[i] * source[i]
        scale = np.float32(1) / np.sqrt(squares / np.float32(size) + eps)
    for i in range(half):
        first, second = source[i] * scale, source[half + i] * scale
        if has_norm:
            first *= norm[i]
            second *= norm[half + i]
        out[i] = first * turn[i] - second * turn[half + i]
        out[half + i] = second * turn[i] + first * turn[half + i]


@lru_cache
def make_attend(group: int, head_dim: int, block_size: int) -> Any:
    """The kernel for these sizes, all of which are known when it is compiled.

    q, out float32 [t, H, head_dim]; kv [blocks, 2, K, block_size * head_dim]; tasks of NumbaPlan; window 0: everything is seen.
    """
    score = make_scores(group, head_dim, block_size)
    weighted_sum = make_weighted_sum(group, head_dim, block_size)

    @kernel
    def attend(q, kv, tasks, block_table, positions, window, scale, out):  # type: ignore[no-untyped-def]
        for task in prange(tasks.shape[0]):
            sequence, head, first, num_queries = tasks[task, 0], tasks[task, 1], tasks[task, 2], tasks[task, 3]
            num_rows = num_queries * group
            queries = np.empty((num_rows, head_dim), np.float32)
            sums = np.zeros((num_rows, head_dim), np.float32)
            largest = np.full(num_rows, _MINUS_INFINITY, np.float32)
            totals = np.zeros(num_rows, np.float32)
            scores = np.empty((group, block_size), np.float32)
            for row in range(num_rows):
                for i in range(head_dim):
                    queries[row, i] = q[first + row // group, head * group + row % group, i] * scale
            start = positions[first]
            begin = max(0, start - window + 1) // block_size if window > 0 else 0
            for index in range(begin, (start + num_queries - 1) // block_size + 1):
                block = block_table[sequence, index]
                keys, values = kv[block, 0, head], kv[block, 1, head]
                for query in range(num_queries):
                    position = start + query - index * block_size
                    low = max(position - window + 1, 0) if window > 0 else 0
                    high = min(position + 1, block_size)
                    if high > low:
                        row = query * group
                        score(queries, row, keys, scores)
                        for g in range(group):
                            decay = soften(scores[g], low, high, row + g, largest, totals)
                            for i in range(head_dim):
                                sums[row + g, i] *= decay
                        weighted_sum(scores, values, low, high, row, sums)
            for row in range(num_rows):
                inverse = np.float32(1) / totals[row]
                for i in range(head_dim):
                    out[first + row // group, head * group + row % group, i] = sums[row, i] * inverse

    @device_function
    def soften(scores, low, high, row, largest, totals):  # type: ignore[no-untyped-def]
        """Turns one row's scores of a block into weights; returns what the row's sums so far have to be multiplied by."""
        for at in range(block_size):
            scores[at] = scores[at] if low <= at < high else _MINUS_INFINITY
        peak = largest[row]
        for at in range(block_size):
            peak = max(peak, scores[at])
        total = np.float32(0)
        for at in range(block_size):
            scores[at] = fast_exp(scores[at] - peak)
            total += scores[at]
        decay = fast_exp(largest[row] - peak)
        largest[row], totals[row] = peak, totals[row] * decay + total
        return decay

    return attend
