"""State of each row on the device: its tokens, its block table, its sampling parameters.

Changed by a plan's differences only.
"""

from __future__ import annotations

import numpy as np
import torch

from pagetide.ops.batch import LogitEdits, to_device
from pagetide.runner.plan import NO_ADAPTER, NO_EDITS, Admission, Draft, StepPlan, bits_of

_FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
_INTEGERS = ("top_k", "seed", "num_prompt")


class Rows:
    """history int64 [max_rows, max_len]: all tokens of each row, sampled ones too, so that the next step
    finds its input on the device.

    Behind the last row stands one more, which no sequence has: -1 is its index, for what a batch is padded
    with.

    lengths int32 [max_rows]: how many of them are in the cache, or on the way there. block_table int32
    [max_rows, max_blocks]; masks int32 [max_rows, vocabulary / 32]: bit i of word w says whether token
    32 * w + i may be sampled, where is_masked [max_rows] is true; edits: of all rows. adapters int64
    [max_rows]: the places of the rows' adapters.
    """

    def __init__(self, max_rows: int, max_len: int, block_size: int, vocab_size: int, device: torch.device):
        self._device = device
        self._vocab_size = vocab_size
        max_blocks = -(-max_len // block_size)
        max_rows += 1
        self.history = torch.zeros((max_rows, max_len + 1), dtype=torch.int64, device=device)
        self.lengths = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self.block_table = torch.zeros((max_rows, max_blocks), dtype=torch.int32, device=device)
        self._floats = torch.zeros((len(_FLOATS), max_rows), dtype=torch.float32, device=device)
        self._integers = torch.zeros((len(_INTEGERS), max_rows), dtype=torch.int64, device=device)
        self.masks = torch.zeros((max_rows, -(-vocab_size // 32)), dtype=torch.int32, device=device)
        self.is_masked = torch.zeros(max_rows, dtype=torch.bool, device=device)
        self.adapters = torch.full((max_rows,), NO_ADAPTER, dtype=torch.int64, device=device)
        self._edits_of = [NO_EDITS] * max_rows
        self.edits = self._gather_edits()

    def admit(self, plan: StepPlan) -> None:
        """Gives the plan's new sequences their rows, and others what has been guessed of their tokens."""
        for admission in plan.admissions:
            self.history[admission.row, : len(admission.token_ids)] = self._upload(admission.token_ids)
        if plan.admissions:
            self._write_numbers(plan.admissions)
            self._write_edits(plan.admissions)
        if plan.drafts:
            self._write_drafts(plan.drafts)

    def _write_drafts(self, drafts: tuple[Draft, ...]) -> None:
        counts = np.array([len(draft.token_ids) for draft in drafts])
        rows, lengths = (np.array([getattr(d, name) for d in drafts]) for name in ("row", "num_computed"))
        # A draft's first guess stands behind the token that comes next.
        firsts = lengths + 1 - (counts.cumsum() - counts)
        places = np.repeat(firsts, counts) + np.arange(counts.sum())
        packed = self._upload(
            np.concatenate([rows, lengths, np.repeat(rows, counts), places, *(d.token_ids for d in drafts)])
        )
        num, num_guesses = len(drafts), int(counts.sum())
        rows_there, lengths_there, owners, positions, guesses = packed.split([num, num, *[num_guesses] * 3])
        self.lengths[rows_there] = lengths_there.int()
        self.history[owners, positions] = guesses

    def params_of(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """The parameters of some rows, by their names: [len(rows)] each."""
        values = (*self._floats[:, rows], *self._integers[:, rows])
        return dict(zip(_FLOATS + _INTEGERS, values, strict=True))

    def set_masks(self, rows: torch.Tensor, masks: np.ndarray) -> None:
        """Says which tokens these rows may sample: int32 [len(rows), vocabulary / 32]."""
        self.masks[rows] = self._upload(masks)
        self.is_masked[rows] = True

    def _write_numbers(self, admissions: tuple[Admission, ...]) -> None:
        rows = self._upload(np.array([a.row for a in admissions]))
        self.lengths[rows] = self._upload(np.array([a.num_computed for a in admissions], np.int32))
        for state, names in ((self._floats, _FLOATS), (self._integers, _INTEGERS)):
            values = [[getattr(a.params, name) for a in admissions] for name in names]
            of_type = np.float32 if state is self._floats else np.int64
            state[:, rows] = self._upload(np.array(values, of_type))
        self.adapters[rows] = self._upload(np.array([a.adapter for a in admissions], np.int64))
        self.is_masked[rows] = False
        for admission in admissions:
            if admission.params.allowed:
                self.set_masks(
                    self._upload(np.array([admission.row])),
                    bits_of(admission.params.allowed, self._vocab_size)[None],
                )

    def _write_edits(self, admissions: tuple[Admission, ...]) -> None:
        before = [self._edits_of[a.row] for a in admissions]
        for admission in admissions:
            self._edits_of[admission.row] = admission.params.edits
        if any(map(len, before)) or any(len(a.params.edits) for a in admissions):
            self.edits = self._gather_edits()

    def _gather_edits(self) -> LogitEdits:
        edits = self._edits_of

        def joined(name: str) -> np.ndarray:
            return np.concatenate([getattr(row, name) for row in edits])

        def starts(lengths: np.ndarray) -> torch.Tensor:
            return self._upload(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))

        return LogitEdits(
            starts=starts(np.array([len(row) for row in edits])),
            tokens=self._upload(joined("tokens")),
            biases=self._upload(joined("biases")),
            below=self._upload(joined("below")),
            prefix_starts=starts(joined("prefix_lengths")),
            prefixes=self._upload(joined("prefixes")),
        )

    def _upload(self, array: np.ndarray) -> torch.Tensor:
        return to_device(array, self._device)
