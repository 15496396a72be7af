"""One step's input as the decoder and the attention backends see it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass
class Batch:
    """[n] sequences, [t] tokens, [s] sampled positions; a slot is a token's place in the cache (block * block_size + offset).

    counts, starts: the plan's, on the host. attention: what the attention backend's plan() returned for this batch.
    """

    ids: torch.Tensor  # int64 [t]
    positions: torch.Tensor  # int64 [t]
    slot_mapping: torch.Tensor  # int64 [t]
    block_table: torch.Tensor  # int32 [n, max_blocks]
    logit_index: torch.Tensor  # int64 [s]
    counts: np.ndarray  # int32 [n]
    starts: np.ndarray  # int32 [n]
    attention: Any = None
