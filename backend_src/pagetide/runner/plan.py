"""The only language between engine, runner and ranks: what runs in a step, and what came out. numpy, no torch.

Legend: [n] sequences of the step, [t] tokens of the step, [s] sampled positions. A row is a sequence's place in device state.
The tokens of the step lie one sequence after the other, in the order of `rows`; token k of sequence i is at sum(counts[:i]) + k.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class RowParams:
    """What the sampler needs to know of a sequence, constant while it holds its row.

    min_position: end_ids are not sampled for positions below it (position: index of the token in the sequence).
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    min_position: int
    end_ids: tuple[int, ...]


@dataclass(frozen=True)
class Admission:
    """A sequence takes a row: its tokens so far (int32 [len]) and its parameters."""

    row: int
    token_ids: np.ndarray
    params: RowParams


@dataclass(frozen=True)
class StepPlan:
    """One engine step. All arrays are int32.

    rows, starts, counts: [n] sequence i runs counts[i] tokens, beginning at position starts[i].
    logit_index, sample_rows, sample_positions: [s] sample from the hidden state of token logit_index into row sample_rows, as the token
        at sample_positions. Several rows may sample from one token (parallel samples); an unfinished prompt chunk has none.
    block_rows, block_indices, block_ids: [d] changes to the rows' block tables. copies: [c, 2] (source, target), before anything is written.
    is_greedy: every sampled row has temperature 0. masks_end_ids: some row is still below its min_position.
    """

    step: int
    rows: np.ndarray
    starts: np.ndarray
    counts: np.ndarray
    logit_index: np.ndarray
    sample_rows: np.ndarray
    sample_positions: np.ndarray
    admissions: tuple[Admission, ...]
    block_rows: np.ndarray
    block_indices: np.ndarray
    block_ids: np.ndarray
    copies: np.ndarray
    is_greedy: bool
    masks_end_ids: bool

    @property
    def num_tokens(self) -> int:
        return int(self.counts.sum())


@dataclass(frozen=True)
class StepTokens:
    """What a step sampled: ids int64 or int32 [s], in the order of sample_rows."""

    ids: np.ndarray
