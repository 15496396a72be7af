"""One step's input as the decoder and the attention backends see it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


def staged(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A step's array where the device can copy it from without being waited for: for a GPU in pinned memory,
    which torch uses again only when it has been read. The array may be forgotten.
    """
    host = torch.from_numpy(np.ascontiguousarray(array))
    return host if device.type == "cpu" else host.pin_memory()


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A step's array on the device, whose copy is queued; for a CPU it is the array itself."""
    host = staged(array, device)
    # Even a copy to where it is already would hand the interpreter to the host's thread, which keeps it for a
    # while.
    return host if device.type == "cpu" else host.to(device, non_blocking=True)


@dataclass(frozen=True)
class Batch:
    """[n] sequences, [t] tokens, [s] positions whose logits are computed.

    Filled once a step, changed by nobody.

    slot_mapping: a token's place in the cache (block * block_size + offset).
    lengths: tokens that each sequence has in the cache when the step has run.
    counts, starts: the plan's, on the host; a sequence's tokens of this step begin at position starts[i].
    adapters: which adapter each token has, -1 for none; None: no token has one.
    """

    ids: torch.Tensor  # int64 [t]
    positions: torch.Tensor  # int64 [t]
    slot_mapping: torch.Tensor  # int64 [t]
    block_table: torch.Tensor  # int32 [n, max_blocks]
    lengths: torch.Tensor  # int32 [n]
    logit_index: torch.Tensor  # int32 [s]
    counts: np.ndarray  # int32 [n]
    starts: np.ndarray  # int32 [n]
    block_size: int
    adapters: torch.Tensor | None = None  # int64 [t]


@dataclass(frozen=True)
class LogitEdits:
    """Changes of single logits of all rows, one after the other: row r has edits starts[r] to starts[r + 1].

    Edit e adds biases[e] to the logit of tokens[e] for positions below below[e], if the row's answer so far
    ends with prefixes[prefix_starts[e] : prefix_starts[e + 1]]. All int32 but biases.
    """

    starts: torch.Tensor  # [max_rows + 1]
    tokens: torch.Tensor  # [e]
    biases: torch.Tensor  # float32 [e]
    below: torch.Tensor  # [e]
    prefix_starts: torch.Tensor  # [e + 1]
    prefixes: torch.Tensor  # [p]
