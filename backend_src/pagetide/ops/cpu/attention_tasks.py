"""How a step's attention is divided into tasks for threads."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pagetide.ops.attention import HeadShape
from pagetide.ops.batch import Batch
from pagetide.ops.cpu.compiled import device_function

MAX_ROWS = 48  # of a task: queries times heads of the group
SPAN = 128  # keys that are looked at together
SEGMENT = 512  # keys whose sums are made by themselves, whoever makes them; parts of split contexts
_TASKS_PER_THREAD = 4


class AttentionTasks(NamedTuple):
    """In the order in which threads take them.

    tasks int64 [num_tasks, 7]: sequence, KV head, first token in the step, queries, position of the first,
    first key, part or -1.
    ends int64 [num_tasks]: the key after the last; merges int64 [num_merges, 4]: token, KV head, first
    part, parts. parts float32 [num_parts, group, D + 2]: sums, then peak and total.
    """

    tasks: np.ndarray
    ends: np.ndarray
    merges: np.ndarray
    parts: np.ndarray


def plan_tasks(batch: Batch, shape: HeadShape, num_threads: int) -> AttentionTasks:
    """Divides a step's attention into tasks."""
    heads, counts, starts = shape.num_kv_heads, batch.counts, batch.starts
    # Single queries may be split along the keys, but only as far as there would be too few tasks otherwise.
    longest = max(SEGMENT, int((starts + counts).sum()) * heads // (_TASKS_PER_THREAD * num_threads))
    tile_queries = max(1, MAX_ROWS // shape.group)
    num_tasks, num_parts, num_merges = _count(starts, counts, tile_queries, longest)
    tasks, ends = np.empty((heads * num_tasks, 7), np.int64), np.empty(heads * num_tasks, np.int64)
    merges = np.empty((heads * num_merges, 4), np.int64)
    cost = np.empty(heads * num_tasks, np.int64)
    _divide(starts, counts, tile_queries, longest, heads, tasks, ends, cost, merges)
    order = np.argsort(-cost, kind="stable")
    # Each thread's contiguous share is about the same work, costly tasks first.
    order = np.concatenate([order[thread::num_threads] for thread in range(num_threads)])
    parts = np.empty((heads * num_parts, shape.group, shape.head_dim + 2), np.float32)
    return AttentionTasks(tasks[order], ends[order], merges, parts)


@device_function
def _count(starts, counts, tile_queries, longest):  # type: ignore[no-untyped-def]
    """Numbers of tasks, parts and merges for each KV head; longest: keys of a single query that is not
    split.
    """
    num_tasks = num_parts = num_merges = 0
    for i in range(counts.shape[0]):
        if counts[i] == 1 and starts[i] + 1 > longest:
            num_ranges = (starts[i] + SEGMENT) // SEGMENT
            num_tasks += num_ranges
            num_parts += num_ranges
            num_merges += 1
        else:
            num_tasks += (counts[i] + tile_queries - 1) // tile_queries
    return num_tasks, num_parts, num_merges


@device_function
def _divide(starts, counts, tile_queries, longest, heads, tasks, ends, cost, merges):  # type: ignore[no-untyped-def]
    """Fills tasks, ends and merges, as AttentionTasks says, and what each task costs."""
    number = part = merged = 0
    for head in range(heads):
        first = 0
        for i in range(counts.shape[0]):
            for offset in range(0, counts[i], tile_queries):
                queries = min(tile_queries, counts[i] - offset)
                position = starts[i] + offset
                last = position + queries
                is_split = counts[i] == 1 and last > longest
                if is_split:
                    merges[merged] = first, head, part, (last + SEGMENT - 1) // SEGMENT
                    merged += 1
                for begin in range(0, last, SEGMENT if is_split else last):
                    ends[number] = min(begin + SEGMENT, last) if is_split else last
                    tasks[number] = (
                        i,
                        head,
                        first + offset,
                        queries,
                        position,
                        begin,
                        part if is_split else -1,
                    )
                    cost[number] = (ends[number] - begin + 32) * queries
                    part += is_split
                    number += 1
            first += counts[i]
