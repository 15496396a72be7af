"""Changes of logits before sampling, one row per thread: penalties, single tokens, masks.

The rules of ops/reference.py.

A row's penalties are read from its own tokens, so that no table of the size of the vocabulary has to be
kept for each sequence.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import prange

from pagetide.ops.batch import LogitEdits
from pagetide.ops.cpu.compiled import kernel

_MINUS_INFINITY = np.float32(-np.inf)


@kernel
def _penalize(num_rows, logits, history, rows, positions, num_prompt, repetition, presence, frequency):  # type: ignore[no-untyped-def]
    for i in prange(num_rows):
        if repetition[i] == 1 and presence[i] == 0 and frequency[i] == 0:
            continue
        tokens, values = history[rows[i]], logits[i]
        seen = np.zeros(values.shape[0], np.bool_)
        for at in range(positions[i]):
            token = tokens[at]
            if not seen[token]:
                seen[token] = True
                values[token] = (
                    values[token] / repetition[i] if values[token] > 0 else values[token] * repetition[i]
                )
        seen[:] = False
        for at in range(num_prompt[i], positions[i]):
            token = tokens[at]
            values[token] -= frequency[i]
            if not seen[token]:
                seen[token] = True
                values[token] -= presence[i]


def penalize(
    logits: torch.Tensor,
    history: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    num_prompt: torch.Tensor,
    repetition: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
) -> None:
    """As ops.reference.penalize."""
    arguments = (logits, history, rows, positions, num_prompt, repetition, presence, frequency)
    _penalize(len(rows), *(tensor.numpy() for tensor in arguments))


@kernel
def _edit(  # type: ignore[no-untyped-def]
    num_rows,
    logits,
    history,
    rows,
    positions,
    num_prompt,
    starts,
    tokens,
    biases,
    below,
    prefix_starts,
    prefixes,
):
    for i in prange(num_rows):
        row, position = rows[i], positions[i]
        for e in range(starts[row], starts[row + 1]):
            first, length = prefix_starts[e], prefix_starts[e + 1] - prefix_starts[e]
            begin = position - length
            applies = position < below[e] and begin >= num_prompt[i]
            for k in range(length):
                applies = applies and history[row, begin + k] == prefixes[first + k]
            if applies:
                logits[i, tokens[e]] += biases[e]


def edit(
    logits: torch.Tensor,
    history: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    num_prompt: torch.Tensor,
    edits: LogitEdits,
) -> None:
    """As ops.reference.edit."""
    tensors = (logits, history, rows, positions, num_prompt)
    flat = (edits.starts, edits.tokens, edits.biases, edits.below, edits.prefix_starts, edits.prefixes)
    _edit(len(rows), *(tensor.numpy() for tensor in (*tensors, *flat)))


@kernel
def _mask(num_rows, logits, masks, is_masked, rows):  # type: ignore[no-untyped-def]
    for i in prange(num_rows):
        if is_masked[rows[i]]:
            words, values = masks[rows[i]], logits[i]
            for token in range(values.shape[0]):
                allowed = words[token >> 5] >> (token & 31) & 1
                values[token] = values[token] if allowed else _MINUS_INFINITY


def mask(logits: torch.Tensor, masks: torch.Tensor, is_masked: torch.Tensor, rows: torch.Tensor) -> None:
    """As ops.reference.mask."""
    _mask(len(rows), logits.numpy(), masks.numpy(), is_masked.numpy(), rows.numpy())
