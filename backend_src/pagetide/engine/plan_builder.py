"""Puts a StepPlan together, and what the scheduler remembers of it until its tokens come."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pagetide.engine.sequence import Sequence
from pagetide.runner.plan import Admission, StepPlan


@dataclass(frozen=True)
class StepSequences:
    """The sequences of a step in the order of its plan.

    sampling: those that sample a token. of_prompt_tokens: the owners of the prompt tokens that are reported
    on, one for each token. guided: those of `sampling` that have a guide.
    """

    sampling: list[Sequence]
    of_prompt_tokens: list[Sequence]
    guided: list[Sequence]


class Chunk(NamedTuple):
    """num_tokens tokens of a sequence, from position start on."""

    sequence: Sequence
    start: int
    num_tokens: int


class Position(NamedTuple):
    """A token of the step whose logits are looked at, and the position of the token that comes next."""

    sequence: Sequence
    token: int
    next_position: int


class PlanBuilder:
    """budget: tokens that the step may still take. preempted: some sequence has given way in this step."""

    def __init__(self, budget: int):
        self.budget = budget
        self.preempted = False
        self._num_tokens = 0
        self._chunks: list[Chunk] = []
        self._samples: list[Position] = []
        self._prompt_tokens: list[Position] = []
        self._admissions: list[Admission] = []
        self._blocks: list[tuple[int, int, int]] = []  # (row, index, block)
        self._copies: list[tuple[int, int]] = []  # (source, target)

    @property
    def is_empty(self) -> bool:
        """True if no token runs in this step."""
        return not self._chunks

    def place(self, sequence: Sequence, copies: list[tuple[int, int]]) -> None:
        """Tells the device the sequence's new blocks, and its tokens if its row does not have them yet.

        copies: (source, target) of the blocks that have taken the place of others, from the one that is
        written next on.
        """
        known = sequence.num_placed
        if known == len(sequence.blocks) and not copies:
            return
        self._copies += copies
        if known is None:
            token_ids = np.array(sequence.token_ids, np.int32)
            self._admissions.append(
                Admission(sequence.row, sequence.num_computed, token_ids, sequence.sampling)
            )
            known = 0
        elif copies:
            known = min(known, sequence.blocks.index(copies[0][1]))
        new = range(known, len(sequence.blocks))
        self._blocks += [(sequence.row, index, sequence.blocks[index]) for index in new]
        sequence.num_placed = len(sequence.blocks)

    def add_chunk(self, sequence: Sequence, count: int) -> None:
        """The next count tokens of a sequence that has been placed."""
        self._chunks.append(Chunk(sequence, sequence.num_computed, count))
        if sequence.group.reports_prompt:
            self._report_prompt(sequence, count)
        self.budget -= count
        self._num_tokens += count
        sequence.num_computed += count

    def _report_prompt(self, sequence: Sequence, count: int) -> None:
        """Asks for what the model thinks of the prompt's own tokens, once for each: a preempted prompt runs
        again.
        """
        group = sequence.group
        start = sequence.num_computed
        last = min(start + count, sequence.num_prompt - 1)
        for position in range(max(start, group.num_prompt_reported), last):
            token = self._num_tokens + position - start
            self._prompt_tokens.append(Position(sequence, token, position + 1))
        group.num_prompt_reported = max(group.num_prompt_reported, last)

    def add_sample(self, sequence: Sequence) -> None:
        """The last token of the last chunk samples the sequence's next token."""
        self._samples.append(Position(sequence, self._num_tokens - 1, sequence.num_wanted))
        sequence.num_pending += 1

    def sequences(self) -> StepSequences:
        """Whose tokens the step will bring, in the order of the plan's rows."""
        sampling = [sequence for sequence, _, _ in self._samples]
        prompts = [sequence for sequence, _, _ in self._prompt_tokens]
        return StepSequences(sampling, prompts, [s for s in sampling if s.guide is not None])

    def plan(self, step: int) -> StepPlan:
        """Freezes what has been put together. step: its number."""
        chunks = _columns([(s.row, start, count) for s, start, count in self._chunks])
        looked_at = [*self._samples, *self._prompt_tokens]
        positions = _columns([(s.row, token, position) for s, token, position in looked_at])
        blocks = _columns(self._blocks)
        # Most sequences ask for nothing but a token: only the others are looked at again and again.
        special = [(at, s) for at, (s, _, _) in enumerate(self._samples) if not s.is_plain]
        prompts = list(enumerate((s for s, _, _ in self._prompt_tokens), len(self._samples)))
        scored = [at for at, s in special if wants_score(s)]
        scored += [at for at, s in prompts if s.group.params.prompt_logprobs is not None]
        returned = [at for at, s in special if returns_logits(s)]
        returned += [at for at, s in prompts if s.request.context_logits]
        searches = [(at, s.group.search) for at, s in special if s.group.search is not None]
        guided = [s.row for _, s in special if s.guide is not None]
        return StepPlan(
            step=step,
            rows=chunks[0],
            starts=chunks[1],
            counts=chunks[2],
            logit_index=positions[1],
            sample_rows=positions[0],
            sample_positions=positions[2],
            num_sampled=len(self._samples),
            admissions=tuple(self._admissions),
            block_rows=blocks[0],
            block_index=blocks[1],
            block_ids=blocks[2],
            copies=np.array(self._copies, np.int32).reshape(-1, 2),
            is_greedy=all(s.sampling.temperature == 0 for s, _, _ in self._samples),
            has_penalties=any(s.sampling.has_penalties for _, s in special),
            has_edits=any(s.sampling.edits_at(s.num_wanted - 1) for _, s in special),
            has_masks=bool(guided) or any(s.sampling.allowed for _, s in special),
            guided_rows=np.array(guided, np.int32),
            score_index=np.array(scored, np.int32),
            num_top=max((num_top(s) for _, s in (*special, *prompts)), default=0),
            beam_index=np.array([at for at, _ in searches], np.int32),
            num_candidates=max((search.num_for_each for _, search in searches), default=0),
            return_index=np.array(returned, np.int32),
        )


def _columns(rows: list[tuple[int, int, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    array = np.array(rows, np.int32).reshape(-1, 3)
    return array[:, 0], array[:, 1], array[:, 2]


def wants_score(sequence: Sequence) -> bool:
    """True if the sampled tokens' log-probabilities are needed: for the client, or to find the best."""
    params = sequence.group.params
    return not sequence.group.is_beam_search and (params.logprobs is not None or params.picks_best)


def returns_logits(sequence: Sequence) -> bool:
    """True if the logits of the position that samples are returned: as the answer's, or as the prompt's
    last ones.
    """
    return sequence.request.generation_logits or (sequence.request.context_logits and samples_first(sequence))


def samples_first(sequence: Sequence) -> bool:
    """True if the sequence's next token, or the one on its way, is the first of the first answer."""
    return sequence.index == 0 and sequence.num_wanted - sequence.num_pending == sequence.num_prompt


def num_top(sequence: Sequence) -> int:
    """How many alternatives the request asks for, to tokens of its answer or of its prompt."""
    return max(sequence.group.params.logprobs or 0, sequence.group.params.prompt_logprobs or 0)
