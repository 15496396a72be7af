"""A step's tokens from the rows' state, in one call."""

from __future__ import annotations

import torch

from pagetide.ops.cpu.compiled import device_function

Tensor = torch.Tensor


@device_function
def _gather(history, block_table, lengths, rows, counts, block_size, ids, positions, slots, tables, ends):  # type: ignore[no-untyped-def]
    token = 0
    for i in range(rows.shape[0]):
        row = rows[i]
        tables[i] = block_table[row]
        for position in range(lengths[row], lengths[row] + counts[i]):
            ids[token], positions[token] = history[row, position], position
            slots[token] = block_table[row, position // block_size] * block_size + position % block_size
            token += 1
        lengths[row] += counts[i]
        ends[i] = lengths[row]


def gather(
    history: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    rows: Tensor,
    counts: Tensor,
    num_tokens: int,
    block_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As ops.reference.gather."""
    ids, positions, slots = torch.empty((3, num_tokens), dtype=torch.int64)
    tables = torch.empty((len(rows), block_table.shape[1]), dtype=torch.int32)
    ends = torch.empty(len(rows), dtype=torch.int32)
    inputs = (array.numpy() for array in (history, block_table, lengths, rows, counts))
    _gather(*inputs, block_size, *(array.numpy() for array in (ids, positions, slots, tables, ends)))
    return ids, positions, slots, tables, ends
