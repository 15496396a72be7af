"""A step's tokens, found on the device: nothing that the host would have to know first."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_TOKENS = 256  # of a sequence that a program writes at a time


@triton.jit(do_not_specialize_on_alignment=["rows", "counts"])
def _gather(
    history,
    block_table,
    lengths,
    rows,
    counts,
    ids,
    positions,
    slots,
    tables,
    new_lengths,
    max_len,
    max_blocks,
    BLOCK_SIZE: tl.constexpr,
    SEQUENCES_BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
):
    sequence = tl.program_id(0)
    row = tl.load(rows + sequence).to(tl.int64)
    count = tl.load(counts + sequence)
    others = tl.arange(0, SEQUENCES_BLOCK)
    first = tl.sum(tl.load(counts + others, mask=others < sequence, other=0))
    at = tl.arange(0, TOKENS)
    if row < 0:  # padding of a graph's batch
        tl.store(new_lengths + sequence, 0)
        for begin in range(0, count, TOKENS):
            inside = begin + at < count
            tl.store(ids + first + begin + at, 0, mask=inside)
            tl.store(positions + first + begin + at, 0, mask=inside)
            tl.store(slots + first + begin + at, -1, mask=inside)
        return
    start = tl.load(lengths + row)
    tl.debug_barrier()
    tl.store(lengths + row, start + count)
    tl.store(new_lengths + sequence, start + count)
    table = block_table + row * max_blocks
    for begin in range(0, count, TOKENS):
        inside = begin + at < count
        position = start + begin + at
        token = tl.load(history + row * max_len + position, mask=inside)
        block = tl.load(table + position // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
        place = first + begin + at
        tl.store(ids + place, token, mask=inside)
        tl.store(positions + place, position.to(tl.int64), mask=inside)
        tl.store(slots + place, block * BLOCK_SIZE + position % BLOCK_SIZE, mask=inside)
    num_blocks = tl.cdiv(start + count, BLOCK_SIZE)
    for begin in range(0, num_blocks, TOKENS):
        inside = begin + at < num_blocks
        block = tl.load(table + begin + at, mask=inside)
        tl.store(tables + sequence.to(tl.int64) * max_blocks + begin + at, block, mask=inside)


def gather(
    history: torch.Tensor,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    rows: torch.Tensor,
    counts: torch.Tensor,
    num_tokens: int,
    block_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """reference.gather in one launch; block tables are filled as far as their sequences reach.

    A row below 0 is padding: its tokens have slot -1, its length is 0.
    """
    device, sequences = rows.device, len(rows)
    ids, positions, slots = (torch.empty(num_tokens, dtype=torch.int64, device=device) for _ in range(3))
    tables = torch.empty((sequences, block_table.shape[1]), dtype=torch.int32, device=device)
    new_lengths = torch.empty(sequences, dtype=torch.int32, device=device)
    _gather[(sequences,)](
        history,
        block_table,
        lengths,
        rows,
        counts,
        ids,
        positions,
        slots,
        tables,
        new_lengths,
        history.shape[1],
        block_table.shape[1],
        block_size,
        triton.next_power_of_2(history.shape[0]),
        _TOKENS,
        num_warps=4,
    )
    return ids, positions, slots, tables, new_lengths


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["rows", "index", "ids"])
def _set_blocks(block_table, rows, index, ids, count, num_rows, max_blocks, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    row = tl.load(rows + at, mask=inside, other=0).to(tl.int64)
    row = tl.where(row < 0, row + num_rows, row)
    place = row * max_blocks + tl.load(index + at, mask=inside, other=0)
    tl.store(block_table + place, tl.load(ids + at, mask=inside, other=0), mask=inside)


def set_blocks(block_table: torch.Tensor, rows: torch.Tensor, index: torch.Tensor, ids: torch.Tensor) -> None:
    """reference.set_blocks in one launch."""
    _set_blocks[(triton.cdiv(len(rows), _TOKENS),)](
        block_table, rows, index, ids, len(rows), *block_table.shape, _TOKENS
    )
