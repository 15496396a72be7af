"""How a step's attention is divided into tasks for threads."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pagetide.ops.attention import HeadShape
from pagetide.ops.batch import Batch
from pagetide.ops.cpu.compiled import device_function
from pagetide.ops.cpu.tiles import TILE_ROWS

MAX_ROWS = 48  # of a task: queries times heads of the group
SPAN = 128  # keys that are looked at together
_SHORTEST_PART = 512  # keys; merging costs more than it gains for fewer
_TASKS_PER_THREAD = 4
_FEWEST_KEYS = 256  # for each task, if it takes several heads


class AttentionTasks(NamedTuple):
    """In the order in which threads take them.

    tasks int64 [num_tasks, 8]: sequence, first KV head, KV heads, first token in the step, queries, position
    of the first, first key, part or -1.
    ends int64 [num_tasks]: the key after the last; merges int64 [num_merges, 4]: token, KV head, first
    part, parts. parts float32 [num_parts, H, D + 2]: sums, then peak and total.
    """

    tasks: np.ndarray
    ends: np.ndarray
    merges: np.ndarray
    parts: np.ndarray


def plan_tasks(batch: Batch, shape: HeadShape, num_threads: int) -> AttentionTasks:
    """Divides a step's attention into tasks."""
    counts, starts = batch.counts, batch.starts
    num_wanted = _TASKS_PER_THREAD * num_threads
    num_keys = int((starts + counts).sum())
    # A single query's task takes several heads, whose keys lie side by side in memory, as long as there are
    # tasks enough.
    heads = 1
    if num_keys >= num_wanted * _FEWEST_KEYS:
        heads = max(1, min(shape.num_kv_heads, MAX_ROWS // rows_of_head(shape.group)))
    num_groups = -(-shape.num_kv_heads // heads)
    # It may be split along the keys, but only as far as there would be too few tasks otherwise.
    share = max(_SHORTEST_PART, num_keys * num_groups // num_wanted)
    share = -(-share // SPAN) * SPAN
    tile_queries = max(1, MAX_ROWS // shape.group)
    num_tasks, num_parts, num_merges = _count(starts, counts, tile_queries, share, shape.num_kv_heads, heads)
    tasks, ends = np.empty((num_tasks, 8), np.int64), np.empty(num_tasks, np.int64)
    merges, cost = np.empty((num_merges, 4), np.int64), np.empty(num_tasks, np.int64)
    _divide(starts, counts, tile_queries, share, shape.num_kv_heads, heads, tasks, ends, cost, merges)
    order = np.argsort(-cost, kind="stable")
    # Each thread's contiguous share is about the same work, costly tasks first.
    order = np.concatenate([order[thread::num_threads] for thread in range(num_threads)])
    parts = np.empty((num_parts, shape.num_heads, shape.head_dim + 2), np.float32)
    return AttentionTasks(tasks[order], ends[order], merges, parts)


@device_function
def rows_of_head(rows):  # type: ignore[no-untyped-def]
    """The rows that a KV head's queries take in a task: whole tiles, since whole tiles are written."""
    return (rows + TILE_ROWS - 1) // TILE_ROWS * TILE_ROWS


@device_function
def _count(starts, counts, tile_queries, share, num_heads, heads_each):  # type: ignore[no-untyped-def]
    """Numbers of tasks, parts and merges."""
    num_tasks = num_parts = num_merges = 0
    for i in range(counts.shape[0]):
        if counts[i] == 1:
            num_ranges = (starts[i] + share) // share
            num_tasks += num_ranges * ((num_heads + heads_each - 1) // heads_each)
            if num_ranges > 1:
                num_parts += num_ranges
                num_merges += num_heads
        else:
            num_tasks += (counts[i] + tile_queries - 1) // tile_queries * num_heads
    return num_tasks, num_parts, num_merges


@device_function
def _divide(starts, counts, tile_queries, share, num_heads, heads_each, tasks, ends, cost, merges):  # type: ignore[no-untyped-def]
    """Fills tasks, ends and merges, as AttentionTasks says, and what each task costs."""
    number = part = merged = first = 0
    for i in range(counts.shape[0]):
        heads = heads_each if counts[i] == 1 else 1
        for offset in range(0, counts[i], tile_queries):
            queries = min(tile_queries, counts[i] - offset)
            position = starts[i] + offset
            last = position + queries
            size = share if counts[i] == 1 else last
            num_ranges = (last + size - 1) // size
            if num_ranges > 1:
                for head in range(num_heads):
                    merges[merged] = first, head, part, num_ranges
                    merged += 1
            for begin in range(0, last, size):
                for head in range(0, num_heads, heads):
                    own_part = part if num_ranges > 1 else -1
                    tasks[number] = (
                        i,
                        head,
                        min(heads, num_heads - head),
                        first + offset,
                        queries,
                        position,
                        begin,
                        own_part,
                    )
                    ends[number] = min(begin + size, last)
                    cost[number] = (ends[number] - begin + 32) * queries * tasks[number, 2]
                    number += 1
                part += num_ranges > 1
        first += counts[i]
