"""The only language between engine, runner and ranks: what runs in a step, and what came out.

numpy, no torch.

Legend: [n] sequences of the step, [t] tokens of the step, [m] positions whose logits are computed, the
first [s] of which sample a token. A row is a sequence's place in device state. The tokens of the step lie
one sequence after the other, in the order of `rows`; token k of sequence i is at sum(counts[:i]) + k.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

ALWAYS = 2**31 - 1
NO_ADAPTER = -1
NO_TOKEN = -1  # what a row samples that has no token left to choose from


def _no_rows() -> np.ndarray:
    return np.empty(0, np.int32)


def _no_pairs() -> np.ndarray:
    return np.empty((0, 2), np.int32)


def bits_of(tokens: Iterable[int], vocab_size: int) -> np.ndarray:
    """A set of tokens as a mask: bit i of word w of int32 [vocabulary / 32] is token 32 * w + i."""
    bits = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
    bits[list(tokens)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


@dataclass(frozen=True)
class LogitEdit:
    """bias is added to the logit of token for positions below `below`, if the answer so far ends with
    prefix.
    """

    token: int
    bias: float
    below: int = ALWAYS
    prefix: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class RowEdits:
    """The LogitEdits of one row as arrays, int32 [e] each but biases (float32); prefixes: of all edits, one
    after the other.
    """

    tokens: np.ndarray
    biases: np.ndarray
    below: np.ndarray
    prefix_lengths: np.ndarray
    prefixes: np.ndarray
    last: int = 0  # no edit applies from this position on

    @classmethod
    def of(cls, edits: Sequence[LogitEdit]) -> RowEdits:
        """The arrays of a row's changes of logits."""
        return cls(
            tokens=np.array([edit.token for edit in edits], np.int32),
            biases=np.array([edit.bias for edit in edits], np.float32),
            below=np.array([min(edit.below, ALWAYS) for edit in edits], np.int32),
            prefix_lengths=np.array([len(edit.prefix) for edit in edits], np.int32),
            prefixes=np.array([token for edit in edits for token in edit.prefix], np.int32),
            last=max((edit.below for edit in edits), default=0),
        )

    def __len__(self) -> int:
        return len(self.tokens)


NO_EDITS = RowEdits.of(())


@dataclass(frozen=True)
class RowParams:
    """What the sampler needs to know of a sequence, constant while it holds its row.

    Fields are those of SamplingParams.

    edits: changes of single logits; allowed: the only tokens that may be sampled, empty for all.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    num_prompt: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    edits: RowEdits = NO_EDITS
    allowed: tuple[int, ...] = ()

    @property
    def has_penalties(self) -> bool:
        """True if tokens of prompt or answer change this row's logits."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def edits_at(self, position: int) -> bool:
        """True if some edit may change the logits for this position."""
        return position < self.edits.last


@dataclass(frozen=True)
class Admission:
    """A sequence takes a row: its tokens so far (int32 [len]), of which num_computed are in the cache, its
    parameters, and the place of its adapter.
    """

    row: int
    num_computed: int
    token_ids: np.ndarray
    params: RowParams
    adapter: int = NO_ADAPTER


@dataclass(frozen=True, eq=False)
class Draft:
    """A row has num_computed tokens in the cache, whatever was computed beyond; behind the token that comes
    next stand these, int32 [g], which are guesses.
    """

    row: int
    num_computed: int
    token_ids: np.ndarray


@dataclass(frozen=True, eq=False)
class AdapterLoad:
    """An adapter's tensors (models.adapters.read_adapter) take a place among those beside the model."""

    place: int
    tensors: dict[str, np.ndarray]


@dataclass(frozen=True)
class StepPlan:
    """One engine step. All arrays are int32.

    rows, starts, counts: [n] sequence i runs counts[i] tokens, beginning at position starts[i].
    logit_index, sample_rows, sample_positions: [m] look at the logits of the step's token logit_index for
        row sample_rows, whose next token stands at sample_positions. The first num_sampled of them sample
        that token; the others are prompt tokens whose successor is known. Several rows may sample from one
        token (parallel samples), and a row from several (guesses); an unfinished prompt chunk samples none.
    adapter_load: happens before anything else. has_adapters: some row of the step has one.
    drafts: of rows that run guesses, or have run wrong ones; they come after admissions.
    block_rows, block_index, block_ids: [d] changes to the rows' block tables.
    swap_outs, swap_ins: [c, 2] blocks (device, host) and (host, device) whose content moves before anything
        else: all outs, then all ins.
    copies: [c, 2] blocks (source, target), copied then, before anything is written.
    is_greedy: every sampled row has temperature 0.
    has_penalties, has_edits, has_masks: some sampled row has them in this step.
    guided_rows: [g] rows whose masks the host brings to sample().
    score_index: [w] which of [m] return log-probabilities, with num_top alternatives.
    beam_index: [b] which of [s] return their num_candidates likeliest tokens.
    return_index: [k] which of [m] return all their logits.
    """

    step: int
    rows: np.ndarray
    starts: np.ndarray
    counts: np.ndarray
    logit_index: np.ndarray
    sample_rows: np.ndarray
    sample_positions: np.ndarray
    num_sampled: int
    admissions: tuple[Admission, ...]
    block_rows: np.ndarray
    block_index: np.ndarray
    block_ids: np.ndarray
    copies: np.ndarray
    is_greedy: bool
    has_penalties: bool = False
    has_edits: bool = False
    has_masks: bool = False
    swap_outs: np.ndarray = field(default_factory=_no_pairs)
    swap_ins: np.ndarray = field(default_factory=_no_pairs)
    guided_rows: np.ndarray = field(default_factory=_no_rows)
    score_index: np.ndarray = field(default_factory=_no_rows)
    num_top: int = 0
    beam_index: np.ndarray = field(default_factory=_no_rows)
    num_candidates: int = 0
    return_index: np.ndarray = field(default_factory=_no_rows)
    drafts: tuple[Draft, ...] = ()
    adapter_load: AdapterLoad | None = None
    has_adapters: bool = False

    @property
    def num_tokens(self) -> int:
        """Tokens that run in the step, of all rows together."""
        return int(self.counts.sum())

    @property
    def moves_blocks(self) -> bool:
        """True if whole blocks are copied before the step."""
        return bool(len(self.copies) or len(self.swap_outs) or len(self.swap_ins))

    @property
    def only_samples(self) -> bool:
        """True if the step brings nothing but tokens, from the logits as they are."""
        asked = len(self.score_index) + len(self.beam_index) + len(self.return_index)
        return not self.adjusts_logits and not asked

    @property
    def adjusts_logits(self) -> bool:
        """True if some sampled row's logits are changed before sampling."""
        return self.has_penalties or self.has_edits or self.has_masks


@dataclass(frozen=True)
class TokenScores:
    """For [w] positions: log-probability and rank of the token there [w], and the likeliest tokens [w, k],
    best first.
    """

    logprobs: np.ndarray
    ranks: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray


@dataclass(frozen=True)
class BeamCandidates:
    """For [b] beams the [k] likeliest tokens after all changes of logits, best first.

    scores: log-probabilities by which beams are compared. logprobs, ranks: of the same tokens under the
    model's own distribution, with its likeliest tokens [b, w].
    """

    ids: np.ndarray
    scores: np.ndarray
    logprobs: np.ndarray
    ranks: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray


@dataclass(frozen=True)
class StepTokens:
    """What a step brought.

    ids int64 [s], in the order of sample_rows; NO_TOKEN where all are ruled out, or the logits are no
    numbers.

    scores, candidates, logits float32 [k, vocabulary]: as the plan asked.
    """

    ids: np.ndarray
    scores: TokenScores | None = None
    candidates: BeamCandidates | None = None
    logits: np.ndarray | None = None
