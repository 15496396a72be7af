"""Memory of each thread's own, for its tasks of attention."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pagetide.kv_cache.layout import PAGE
from pagetide.ops.cpu.attention_tasks import MAX_ROWS, SPAN
from pagetide.ops.cpu.tiles import TILE_ROWS


class Scratch(NamedTuple):
    """Each thread's own memory.

    Rows of the last tile that stand for nothing are read too, so it begins as zeros.
    """

    queries: np.ndarray  # [threads, rows, D], as the queries
    weights: np.ndarray  # [threads, rows, SPAN], as the queries
    scores: np.ndarray  # float32 [threads, rows, SPAN]
    sums: np.ndarray  # float32 [threads, rows, D]
    peaks: np.ndarray  # float32 [threads, rows]
    totals: np.ndarray
    places: np.ndarray  # int64 [threads, 3, pages of a span]: keys, values, the next span's keys


def make_scratch(num_threads: int, head_dim: int, dtype: type[np.generic]) -> Scratch:
    """For so many threads. dtype: that of keys and values."""
    shape = (num_threads, MAX_ROWS + TILE_ROWS)
    return Scratch(
        queries=np.zeros((*shape, head_dim), dtype),
        weights=np.zeros((*shape, SPAN), dtype),
        scores=np.zeros((*shape, SPAN), np.float32),
        sums=np.zeros((*shape, head_dim), np.float32),
        peaks=np.zeros(shape, np.float32),
        totals=np.zeros(shape, np.float32),
        places=np.zeros((num_threads, 3, SPAN // PAGE), np.int64),
    )
