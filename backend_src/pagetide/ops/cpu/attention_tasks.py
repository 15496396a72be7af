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
_MOST_OWN = 8  # segments of a sequence for each that it shares: all of them become parts, which cost memory


class AttentionTasks(NamedTuple):
    """In the order in which threads take them.

    tasks int64 [num_tasks, 8]: sequence, KV head, first token in the step, queries, position of the first,
    first key, part or -1, first member or -1.
    ends int64 [num_tasks]: the key after the last; merges int64 [num_merges, 4]: token, KV head, first
    part, parts. parts float32 [num_parts, group, D + 2]: sums, then peak and total.
    members int64 [num_members, 2]: token and part of each query of tasks whose queries are of several
    sequences, which have the same keys; first token and part of such a task say nothing.
    """

    tasks: np.ndarray
    ends: np.ndarray
    merges: np.ndarray
    parts: np.ndarray
    members: np.ndarray


def plan_tasks(batch: Batch, shape: HeadShape, num_threads: int, may_share: bool = True) -> AttentionTasks:
    """Divides a step's attention into tasks. may_share: no layer has a window."""
    heads, counts, starts = shape.num_kv_heads, batch.counts, batch.starts
    # Single queries may be split along the keys, but only as far as there would be too few tasks otherwise,
    # or as others have the same keys.
    longest = max(SEGMENT, int((starts + counts).sum()) * heads // (_TASKS_PER_THREAD * num_threads))
    tile_queries = max(1, MAX_ROWS // shape.group)
    shared, shares = _shared_segments(batch) if may_share else ([], np.zeros(len(counts), np.int64))
    num_shared = sum(len(sequences) for _, sequences in shared)
    tile_shared = min(tile_queries, num_shared * heads // (2 * num_threads))
    if tile_shared < 2:  # nothing would be read once for several
        shared, shares = [], np.zeros(len(counts), np.int64)
    num_tasks, num_parts, num_merges = _count(starts, counts, shares, tile_queries, longest)
    tasks, ends = np.empty((heads * num_tasks, 8), np.int64), np.empty(heads * num_tasks, np.int64)
    merges = np.empty((heads * num_merges, 4), np.int64)
    cost = np.empty(heads * num_tasks, np.int64)
    _divide(starts, counts, shares, tile_queries, longest, heads, tasks, ends, cost, merges)
    members = np.empty((0, 2), np.int64)
    if shared:
        of_all, members = _join(batch, shared, merges.reshape(heads, num_merges, 4), tile_shared)
        tasks = np.concatenate([tasks, of_all])
        ends = np.concatenate([ends, of_all[:, 5] + SEGMENT])
        cost = np.concatenate([cost, (SEGMENT + 32) * of_all[:, 3]])
    order = np.argsort(-cost, kind="stable")
    # Each thread's contiguous share is about the same work, costly tasks first.
    order = np.concatenate([order[thread::num_threads] for thread in range(num_threads)])
    parts = np.empty((heads * num_parts, shape.group, shape.head_dim + 2), np.float32)
    return AttentionTasks(tasks[order], ends[order], merges, parts, members)


def _shared_segments(batch: Batch) -> tuple[list[tuple[int, np.ndarray]], np.ndarray]:
    """(segment, sequences) for each segment that several sequences of a single query have in the same
    blocks, as those with a common prefix do; and of each sequence how many segments, from the first on,
    are among them: int64 [n].
    """
    starts, num_blocks = batch.starts, SEGMENT // batch.block_size
    shares = np.zeros(len(starts), np.int64)
    left = np.flatnonzero((batch.counts == 1) & (starts >= SEGMENT - 1))
    if len(left) < 2 or SEGMENT % batch.block_size:
        return [], shares
    table, found = batch.block_table.numpy(), []
    for segment in range(table.shape[1] // num_blocks):
        blocks = table[:, segment * num_blocks : (segment + 1) * num_blocks]
        alike = [
            sequences[(blocks[sequences] == blocks[sequences[0]]).all(1)]
            for sequences in _grouped(left, blocks[left, -1])
        ]
        alike = [sequences for sequences in alike if len(sequences) > 1]
        if not alike:
            break
        found += [(segment, sequences) for sequences in alike]
        left = np.concatenate(alike)
        shares[left] = segment + 1
        left = left[starts[left] >= (segment + 2) * SEGMENT - 1]
    shares[shares * _MOST_OWN < starts // SEGMENT + 1] = 0
    kept = [(segment, sequences[shares[sequences] > segment]) for segment, sequences in found]
    return [(segment, sequences) for segment, sequences in kept if len(sequences)], shares


def _grouped(values: np.ndarray, keys: np.ndarray) -> list[np.ndarray]:
    """Those of values [n] whose keys [n] are equal, where several are."""
    order = np.argsort(keys, kind="stable")
    parts = np.split(values[order], np.flatnonzero(np.diff(keys[order])) + 1)
    return [part for part in parts if len(part) > 1]


def _join(
    batch: Batch, shared: list[tuple[int, np.ndarray]], merges: np.ndarray, tile_queries: int
) -> tuple[np.ndarray, np.ndarray]:
    """tasks and members of all that is shared; merges: as AttentionTasks', [heads, merges, 4]."""
    tokens = np.cumsum(batch.counts, dtype=np.int64) - batch.counts
    heads = np.arange(len(merges))
    tasks: list[np.ndarray] = []
    members: list[np.ndarray] = []
    num_members = 0
    for segment, sequences in shared:
        for first in range(0, len(sequences), tile_queries):
            own = sequences[first : first + tile_queries]
            start, at = batch.starts[own].min(), np.searchsorted(merges[0, :, 0], tokens[own])
            task = np.empty((len(heads), 8), np.int64)
            task[:] = own[0], 0, 0, len(own), start, segment * SEGMENT, 0, num_members
            task[:, 1] = heads
            task[:, 7] += heads * len(own)
            parts = merges[:, at, 2] + segment
            members.append(np.stack([np.broadcast_to(tokens[own], parts.shape), parts], axis=2))
            tasks.append(task)
            num_members += parts.size
    return np.concatenate(tasks), np.concatenate([part.reshape(-1, 2) for part in members])


@device_function
def _count(starts, counts, shares, tile_queries, longest):  # type: ignore[no-untyped-def]
    """Numbers of tasks, parts and merges for each KV head; longest: keys of a single query that is not
    split; shares: segments at the beginning of each sequence that are not its own.
    """
    num_tasks = num_parts = num_merges = 0
    for i in range(counts.shape[0]):
        if counts[i] == 1 and (starts[i] + 1 > longest or shares[i] > 0):
            num_ranges = (starts[i] + SEGMENT) // SEGMENT
            num_tasks += num_ranges - shares[i]
            num_parts += num_ranges
            num_merges += 1
        else:
            num_tasks += (counts[i] + tile_queries - 1) // tile_queries
    return num_tasks, num_parts, num_merges


@device_function
def _divide(starts, counts, shares, tile_queries, longest, heads, tasks, ends, cost, merges):  # type: ignore[no-untyped-def]
    """Fills tasks, ends and merges, as AttentionTasks says, and what each task costs, but for what is
    shared.
    """
    number = part = merged = 0
    for head in range(heads):
        first = 0
        for i in range(counts.shape[0]):
            for offset in range(0, counts[i], tile_queries):
                queries = min(tile_queries, counts[i] - offset)
                position = starts[i] + offset
                last = position + queries
                is_split = counts[i] == 1 and (last > longest or shares[i] > 0)
                if is_split:
                    merges[merged] = first, head, part, (last + SEGMENT - 1) // SEGMENT
                    merged += 1
                    part += shares[i]
                for begin in range(shares[i] * SEGMENT, last, SEGMENT if is_split else last):
                    ends[number] = min(begin + SEGMENT, last) if is_split else last
                    tasks[number] = (
                        i,
                        head,
                        first + offset,
                        queries,
                        position,
                        begin,
                        part if is_split else -1,
                        -1,
                    )
                    cost[number] = (ends[number] - begin + 32) * queries
                    part += is_split
                    number += 1
            first += counts[i]
