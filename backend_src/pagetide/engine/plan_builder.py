"""Puts a StepPlan together, and what the scheduler remembers of it until its tokens come."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pagetide.engine.sequence import Sequence
from pagetide.runner.plan import AdapterLoad, Admission, Draft, StepPlan


@dataclass(frozen=True)
class StepSequences:
    """The sequences of a step in the order of its plan.

    sampling: those that sample a token. of_prompt_tokens: the owners of the prompt tokens that are reported
    on, one for each token. guided: those of `sampling` that have a guide.
    """

    sampling: list[Sequence]
    of_prompt_tokens: list[Sequence]
    guided: list[Sequence]


class Positions:
    """Tokens of the step whose logits are looked at, one in each place of the lists: whose it is, which token
    of the step, and the position of the token that comes next.
    """

    def __init__(self) -> None:
        self.sequences: list[Sequence] = []
        self.tokens: list[int] = []
        self.next_positions: list[int] = []

    def add(self, sequence: Sequence, token: int, next_position: int) -> None:
        self.sequences.append(sequence)
        self.tokens.append(token)
        self.next_positions.append(next_position)


# Prompt tokens of one step whose logits are looked at: each costs a row of the vocabulary's size.
MAX_REPORTED = 512


class PlanBuilder:
    """budget: tokens that the step may still take. preempted: some sequence has given way in this step.

    swap_outs: (device block, host block), swap_ins: (host block, device block). adapter_load: as StepPlan's.
    """

    def __init__(self, budget: int):
        self.budget = budget
        self.preempted = False
        self.swap_outs: list[tuple[int, int]] = []
        self.swap_ins: list[tuple[int, int]] = []
        self.adapter_load: AdapterLoad | None = None
        self._num_tokens = 0
        self._rows: list[int] = []  # of each chunk: its row, first position and number of tokens
        self._starts: list[int] = []
        self._counts: list[int] = []
        self._samples = Positions()
        self._prompt_tokens = Positions()
        self._admissions: list[Admission] = []
        self._blocks: list[tuple[int, int, int]] = []  # (row, index, block)
        self._copies: list[tuple[int, int]] = []  # (source, target)
        self._drafts: list[Draft] = []
        self._has_adapters = False

    @property
    def is_empty(self) -> bool:
        """True if no token runs in this step."""
        return not self._rows

    def room_for(self, sequence: Sequence) -> int:
        """How many tokens of this sequence the step may still take."""
        if not sequence.group.reports_prompt or sequence.num_computed >= sequence.num_prompt:
            return self.budget
        return min(self.budget, MAX_REPORTED - len(self._prompt_tokens.sequences))

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
                Admission(
                    sequence.row,
                    sequence.num_computed,
                    token_ids,
                    sequence.sampling,
                    sequence.group.adapter_place,
                )
            )
            known = 0
        elif copies:
            known = min(known, sequence.blocks.index(copies[0][1]))
        new = range(known, len(sequence.blocks))
        self._blocks += [(sequence.row, index, sequence.blocks[index]) for index in new]
        sequence.num_placed = len(sequence.blocks)

    def add_chunk(self, sequence: Sequence, count: int) -> None:
        """The next count tokens of a sequence that has been placed."""
        self._rows.append(sequence.row)
        self._starts.append(sequence.num_computed)
        self._counts.append(count)
        if sequence.group.reports_prompt:
            self._report_prompt(sequence, count)
        if sequence.group.adapter is not None:
            self._has_adapters = True
        speculator = sequence.speculator
        if speculator is not None and (speculator.guesses or speculator.is_ahead):
            guesses = np.array(speculator.guesses, np.int32)
            self._drafts.append(Draft(sequence.row, sequence.num_computed, guesses))
            speculator.is_ahead = False
        self.budget -= count
        assert self.budget >= 0, self.budget
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
            self._prompt_tokens.add(sequence, token, position + 1)
        group.num_prompt_reported = max(group.num_prompt_reported, last)

    def add_sample(self, sequence: Sequence) -> None:
        """The last token of the last chunk samples the sequence's next token; where guesses stand behind it,
        each of them samples one too.
        """
        num_guessed = sequence.num_guessed
        for token in range(self._num_tokens - 1 - num_guessed, self._num_tokens):
            self._samples.add(sequence, token, sequence.num_wanted)
            sequence.num_pending += 1

    def sequences(self) -> StepSequences:
        """Whose tokens the step will bring, in the order of the plan's rows."""
        sampling = self._samples.sequences
        guided = [sequence for sequence in sampling if sequence.guide is not None]
        return StepSequences(sampling, self._prompt_tokens.sequences, guided)

    def plan(self, step: int) -> StepPlan:
        """Freezes what has been put together. step: its number."""
        samples, prompt_tokens = self._samples, self._prompt_tokens
        blocks = np.array(self._blocks, np.int32).reshape(-1, 3)
        # Most sequences ask for nothing but a token: only the others are looked at again and again.
        special = [(at, s) for at, s in enumerate(samples.sequences) if not s.is_plain]
        prompts = list(enumerate(prompt_tokens.sequences, len(samples.sequences)))
        scored = [at for at, s in special if wants_score(s)]
        scored += [at for at, s in prompts if s.group.params.prompt_logprobs is not None]
        returned = [at for at, s in special if returns_logits(s)]
        returned += [at for at, s in prompts if s.request.context_logits]
        searches = [(at, s.group.search) for at, s in special if s.group.search is not None]
        guided = [s.row for _, s in special if s.guide is not None]
        return StepPlan(
            step=step,
            rows=np.array(self._rows, np.int32),
            starts=np.array(self._starts, np.int32),
            counts=np.array(self._counts, np.int32),
            logit_index=np.array(samples.tokens + prompt_tokens.tokens, np.int32),
            sample_rows=np.array([s.row for s in samples.sequences + prompt_tokens.sequences], np.int32),
            sample_positions=np.array(samples.next_positions + prompt_tokens.next_positions, np.int32),
            num_sampled=len(samples.sequences),
            admissions=tuple(self._admissions),
            block_rows=blocks[:, 0],
            block_index=blocks[:, 1],
            block_ids=blocks[:, 2],
            copies=_pairs(self._copies),
            swap_outs=_pairs(self.swap_outs),
            swap_ins=_pairs(self.swap_ins),
            is_greedy=all(s.sampling.temperature == 0 for s in samples.sequences),
            has_penalties=any(s.sampling.has_penalties for _, s in special),
            has_edits=any(s.sampling.edits_at(samples.next_positions[at]) for at, s in special),
            has_masks=bool(guided) or any(s.sampling.allowed for _, s in special),
            guided_rows=np.array(guided, np.int32),
            score_index=np.array(scored, np.int32),
            num_top=max((num_top(s) for _, s in (*special, *prompts)), default=0),
            beam_index=np.array([at for at, _ in searches], np.int32),
            num_candidates=max((search.num_for_each for _, search in searches), default=0),
            return_index=np.array(returned, np.int32),
            drafts=tuple(self._drafts),
            adapter_load=self.adapter_load,
            has_adapters=self._has_adapters,
        )


def _pairs(blocks: list[tuple[int, int]]) -> np.ndarray:
    return np.array(blocks, np.int32).reshape(-1, 2)


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
