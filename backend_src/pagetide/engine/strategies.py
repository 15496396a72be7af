"""How sequences become answers: samples, the best of several, or the beams of a search."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from pagetide.engine.sequence import Answer, Sequence
from pagetide.runner.plan import BeamCandidates

_MAX_EXAMINED = 4  # continuations that a step of a beam search makes, for each beam


class Samples:
    """Every sequence is an answer by itself."""

    def end(self, sequences: list[Sequence], reason: str) -> list[Answer]:
        return [Answer(sequence, sequence.index, reason) for sequence in sequences]


@dataclass
class BestOf:
    """The num_answers sequences with the highest log-probability, when all have ended."""

    num_answers: int
    num_samples: int
    ended: list[tuple[Sequence, str]] = field(default_factory=list)

    def end(self, sequences: list[Sequence], reason: str) -> list[Answer]:
        self.ended += [(sequence, reason) for sequence in sequences]
        if len(self.ended) < self.num_samples:
            return []
        best = sorted(self.ended, key=lambda one: -one[0].cumulative_logprob)[: self.num_answers]
        return [Answer(one, index, reason) for index, (one, reason) in enumerate(best)]


@dataclass
class BeamSearch:
    """Beam search by the rules of transformers' `generate`, whose answers it gives.

    Each step looks at num_candidates continuations of all beams together. Those that end and are among
    the first `width` become finished beams, if they score better than the worst of at most `width`
    finished ones; the others are the beams of the next step.
    num_for_each: so many continuations of each beam are enough to find them.
    finished: (score, beam, reason), best first.
    """

    width: int
    num_candidates: int
    num_for_each: int
    num_answers: int
    length_penalty: float
    early_stopping: bool
    finished: list[tuple[float, Sequence, str]] = field(default_factory=list)
    can_improve: bool = True

    def go_on(self, beams: list[Sequence]) -> list[tuple[Sequence, Sequence]]:
        """As Search's."""
        following: list[tuple[Sequence, Sequence]] = []
        was_full = len(self.finished) == self.width
        num_examined = 0
        for place, (beam, rank) in enumerate(self._best(beams)):
            if place >= self.width and beam.stops.is_end(int(known(beam).ids[rank])):
                continue
            # A step's work is bounded: where nearly all texts are stop texts, the search has nothing to go
            # on with.
            num_examined += 1
            if num_examined > _MAX_EXAMINED * self.width or (
                len(following) == self.width and place >= self.width
            ):
                break
            child = beam.child(rank)
            reason = child.stops.push(child.token_ids[-1]) or (
                "length" if len(child.token_ids) >= child.max_len else ""
            )
            if not reason:
                if len(following) < self.width:
                    following.append((beam, child))
            elif place < self.width and self.can_improve and not (was_full and self.early_stopping):
                self._finish(child, reason)
        self._look_ahead([child for _, child in following])
        return [] if self._is_over else following

    def _best(self, beams: list[Sequence]) -> list[tuple[Sequence, int]]:
        """(beam, place among its candidates) of the best continuations that are allowed, best first."""
        # As many of each beam as this search needs, whatever others in the step have asked for.
        own = [known(beam).scores[: self.num_for_each] for beam in beams]
        scores = np.concatenate([beam.beam_score + some for beam, some in zip(beams, own, strict=True)])
        owners = np.repeat(np.arange(len(beams)), list(map(len, own)))
        ranks = np.concatenate([np.arange(len(some)) for some in own])
        order = np.argsort(-scores, kind="stable")[: self.num_candidates]
        return [(beams[owners[i]], int(ranks[i])) for i in order.tolist() if np.isfinite(scores[i])]

    def _finish(self, child: Sequence, reason: str) -> None:
        self.finished.append((self._score(child), child, reason))
        self.finished.sort(key=lambda one: -one[0])
        del self.finished[self.width :]

    def _score(self, beam: Sequence) -> float:
        return beam.beam_score / (len(beam.token_ids) - beam.num_prompt) ** self.length_penalty

    def _look_ahead(self, beams: list[Sequence]) -> None:
        if beams and len(self.finished) == self.width:
            self.can_improve = self.can_improve and self._score(beams[0]) > self.finished[-1][0]

    @property
    def _is_over(self) -> bool:
        return not self.can_improve or (self.early_stopping and len(self.finished) == self.width)

    def end(self, sequences: list[Sequence], reason: str) -> list[Answer]:
        """The best num_answers beams, of those that had finished and those that ran when the search ended.

        Where there are fewer (the search had not begun, or the rules of the request leave fewer), the last
        answers have no tokens.
        """
        best: list[tuple[Sequence | None, str]] = [(sequence, why) for _, sequence, why in self.finished]
        best += [(sequence, reason) for sequence in sorted(sequences, key=lambda beam: -beam.beam_score)]
        best += [(None, reason)] * (self.num_answers - len(best))
        return [Answer(beam, index, why) for index, (beam, why) in enumerate(best[: self.num_answers])]


def known(beam: Sequence) -> BeamCandidates:
    """The candidates of a beam that has them."""
    assert beam.candidates is not None
    return beam.candidates
