"""Memory of each thread's own, for its tasks of attention."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pagetide.kv_cache.layout import PAGE
from pagetide.ops.cpu.attention_tasks import MAX_ROWS, SPAN
from pagetide.ops.cpu.tiles import TILE_ROWS

KEYS, VALUES, NEXT_KEYS = 0, 1, 2  # rows of Scratch.places


class Scratch(NamedTuple):
    """Each thread's own memory.

    Rows of the last tile that stand for nothing are read too, so it begins as zeros.
    """

    queries: np.ndarray  # [threads, rows, D], as the queries
    weights: np.ndarray  # [threads, rows, SPAN], as the queries; float32 for a cache of integers
    scores: np.ndarray  # float32 [threads, rows, SPAN]
    sums: np.ndarray  # float32 [threads, rows, D]
    peaks: np.ndarray  # float32 [threads, rows]
    totals: np.ndarray
    folded: np.ndarray  # float32 [threads, rows, D + 2]: sums of the segments so far, peak, total
    places: np.ndarray  # int64 [threads, 3, pages of a span]: where they begin
    query_codes: np.ndarray  # int8 [threads, rows * 2 * D]: for a cache of integers
    query_scales: np.ndarray  # float32 [threads, rows * 2]
    weight_codes: np.ndarray  # int8 [threads, rows * 2 * SPAN]
    weight_scales: np.ndarray  # float32 [threads, rows * 2]


def make_scratch(num_threads: int, head_dim: int, dtype: type[np.generic], rounds: bool = False) -> Scratch:
    """For so many threads. dtype: that of queries; rounds: keys and values are integers."""
    shape = (num_threads, MAX_ROWS + TILE_ROWS)
    rows = shape[1] if rounds else 0
    return Scratch(
        queries=np.zeros((*shape, head_dim), dtype),
        weights=np.zeros((*shape, SPAN), np.float32 if rounds else dtype),
        scores=np.zeros((*shape, SPAN), np.float32),
        sums=np.zeros((*shape, head_dim), np.float32),
        peaks=np.zeros(shape, np.float32),
        totals=np.zeros(shape, np.float32),
        folded=np.zeros((*shape, head_dim + 2), np.float32),
        places=np.zeros((num_threads, 3, SPAN // PAGE), np.int64),
        query_codes=np.zeros((num_threads, rows * 2 * head_dim), np.int8),
        query_scales=np.zeros((num_threads, rows * 2), np.float32),
        weight_codes=np.zeros((num_threads, rows * 2 * SPAN), np.int8),
        weight_scales=np.zeros((num_threads, rows * 2), np.float32),
    )
