"""A StepPlan while the scheduler puts it together, and what the scheduler remembers of it until its tokens come."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from pagetide.engine.sequence import Sequence
from pagetide.engine.strategies import BeamSearch
from pagetide.runner.plan import Admission, StepPlan


@dataclass(frozen=True)
class Flight:
    """The sequences of a step in flight, in the order of its plan: those that sample, those that look at a prompt token, guided ones."""

    samples: list[Sequence]
    looks: list[Sequence]
    guided: list[Sequence]


@dataclass
class Draft:
    """budget: tokens that the step may still take. chunks: (sequence, start, count); samples: (sequence, token of the step);
    looks: (sequence, token of the step, position of the token that comes next); blocks: (row, index, block); copies: (source, target).
    """

    budget: int
    chunks: list[tuple[Sequence, int, int]] = field(default_factory=list)
    samples: list[tuple[Sequence, int]] = field(default_factory=list)
    looks: list[tuple[Sequence, int, int]] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)
    blocks: list[tuple[int, int, int]] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    num_tokens: int = 0
    preempted: bool = False

    def place(self, sequence: Sequence, first_changed: int) -> None:
        """Tells the device the sequence's blocks from index first_changed on; all, and its tokens, if its row does not have them yet."""
        if not sequence.is_placed:
            sequence.is_placed = True
            self.admitted.append(sequence)
            first_changed = 0
        self.blocks.extend((sequence.row, index, sequence.blocks[index]) for index in range(first_changed, len(sequence.blocks)))

    def add_chunk(self, sequence: Sequence, count: int) -> None:
        self.chunks.append((sequence, sequence.num_computed, count))
        self._look_at_prompt(sequence, count)
        self.budget -= count
        self.num_tokens += count
        sequence.num_computed += count

    def _look_at_prompt(self, sequence: Sequence, count: int) -> None:
        """Asks for what the model thinks of the prompt's own tokens, once for each: a preempted prompt runs again."""
        group = sequence.group
        if not group.looks_at_prompt:
            return
        start = sequence.num_computed
        last = min(start + count, sequence.num_prompt - 1)
        for position in range(max(start, group.num_looked), last):
            self.looks.append((sequence, self.num_tokens + position - start, position + 1))
        group.num_looked = max(group.num_looked, last)

    def add_sample(self, sequence: Sequence) -> None:
        """The last token of the last chunk samples the sequence's next token."""
        sequence.num_pending += 1
        self.samples.append((sequence, self.num_tokens - 1))

    def flight(self) -> Flight:
        samples = [sequence for sequence, _ in self.samples]
        return Flight(samples, [sequence for sequence, _, _ in self.looks], [s for s in samples if s.guide is not None])

    def plan(self, step: int) -> StepPlan:
        # num_wanted counts the token that this step samples; it stands at the position before that.
        positions = [(at, s.row, s.num_wanted - 1) for s, at in self.samples] + [(at, s.row, position) for s, at, position in self.looks]
        chunks, samples = _columns([(s.row, start, count) for s, start, count in self.chunks]), _columns(positions)
        deltas = _columns(self.blocks)
        # Most sequences ask for nothing but a token: only the others are looked at again and again.
        special = [(i, s) for i, (s, _) in enumerate(self.samples) if not s.is_plain]
        looking = list(enumerate((sequence for sequence, _, _ in self.looks), len(self.samples)))
        guided = [s.row for _, s in special if s.guide is not None]
        scored = [i for i, s in special if wants_score(s)] + [i for i, s in looking if s.group.params.prompt_logprobs is not None]
        kept = [i for i, s in special if keeps_logits(s)] + [i for i, s in looking if s.request.context_logits]
        beams = [(i, s.group.strategy) for i, s in special if isinstance(s.group.strategy, BeamSearch)]
        return StepPlan(
            step=step,
            rows=chunks[0],
            starts=chunks[1],
            counts=chunks[2],
            logit_index=samples[0],
            sample_rows=samples[1],
            sample_positions=samples[2],
            num_sampled=len(self.samples),
            admissions=tuple(Admission(s.row, np.array(s.token_ids, np.int32), s.sampling) for s in self.admitted),
            block_rows=deltas[0],
            block_indices=deltas[1],
            block_ids=deltas[2],
            copies=np.array(self.copies, np.int32).reshape(-1, 2),
            is_greedy=all(s.sampling.temperature == 0 for s, _ in self.samples),
            has_penalties=any(s.sampling.has_penalties for _, s in special),
            has_edits=any(s.sampling.edits_at(s.num_wanted - 1) for _, s in special),
            has_masks=bool(guided) or any(s.sampling.allowed for _, s in special),
            guided=np.array(guided, np.int32),
            scored=np.array(scored, np.int32),
            num_top=max((num_top(s) for _, s in (*special, *looking)), default=0),
            beams=np.array([i for i, _ in beams], np.int32),
            num_candidates=max((search.num_for_each for _, search in beams), default=0),
            kept=np.array(kept, np.int32),
        )


def _columns(rows: list[tuple[int, int, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    array = np.array(rows, np.int32).reshape(-1, 3)
    return array[:, 0], array[:, 1], array[:, 2]


def wants_score(sequence: Sequence) -> bool:
    """True if the log-probabilities of the sampled tokens are needed: for the client, or to find the best of several."""
    params = sequence.group.params
    return not sequence.group.is_beam_search and (params.logprobs is not None or params.picks_best)


def keeps_logits(sequence: Sequence) -> bool:
    """True if the logits of the position that samples are returned: those of the prompt's last token belong to the context, too."""
    return sequence.request.generation_logits or (sequence.request.context_logits and samples_first(sequence))


def samples_first(sequence: Sequence) -> bool:
    """True if the sequence's next token, or the one on its way, is the first of the request's first answer."""
    return sequence.index == 0 and sequence.num_wanted - sequence.num_pending == sequence.num_prompt


def num_top(sequence: Sequence) -> int:
    return max(sequence.group.params.logprobs or 0, sequence.group.params.prompt_logprobs or 0)
