"""How a request becomes sequences and an answer: samples that share the prompt's blocks, the best of several, or beams."""

from __future__ import annotations

import hashlib
import secrets
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from pagetide.engine.guides import GuideState
from pagetide.engine.sequence import Sequence, SequenceGroup
from pagetide.engine.stops import StopChecker, StopRules, stop_text
from pagetide.runner.plan import NO_EDITS, BeamCandidates, LogitEdit, RowEdits, RowParams, bits_of
from pagetide.text.tokens import Vocabulary
from pagetide.types import MIN_TEMPERATURE, Request, SamplingParams

_MAX_LOOKS = 4  # continuations that a step of a beam search makes, for each beam


@dataclass(frozen=True)
class ModelLimits:
    """What the engine knows of the model and the settings.

    vocab_size: tokens that the model can sample. end_ids: the model's own end-of-sequence tokens.
    max_output_tokens: cap for requests that name no max_tokens.
    """

    vocabulary: Vocabulary
    vocab_size: int
    end_ids: frozenset[int]
    max_model_len: int
    max_output_tokens: int


@dataclass(frozen=True)
class Answer:
    """A sequence as its client sees it; None where there is none: an answer without tokens."""

    sequence: Sequence | None
    index: int
    reason: str


class Strategy(Protocol):
    """What becomes of sequences that end."""

    def end(self, sequence: Sequence, reason: str) -> list[Answer]:
        """Takes a sequence that has ended; returns the answers that are known now."""


class Samples:
    """Every sequence is an answer by itself."""

    def end(self, sequence: Sequence, reason: str) -> list[Answer]:
        return [Answer(sequence, sequence.index, reason)]


@dataclass
class BestOf:
    """The num_answers sequences with the highest log-probability, when all have ended."""

    num_answers: int
    num_left: int
    ended: list[tuple[Sequence, str]] = field(default_factory=list)

    def end(self, sequence: Sequence, reason: str) -> list[Answer]:
        self.ended.append((sequence, reason))
        self.num_left -= 1
        if self.num_left:
            return []
        best = sorted(self.ended, key=lambda one: -one[0].cumulative_logprob)[: self.num_answers]
        return [Answer(one, index, reason) for index, (one, reason) in enumerate(best)]


@dataclass
class BeamSearch:
    """Beam search by the rules of transformers' `generate`, whose answers it gives.

    Each step looks at num_candidates continuations of all beams together. Those that end and are among the first `width` become finished
    beams, if they score better than the worst of at most `width` finished ones; the others are the beams of the next step.
    num_for_each: so many continuations of each beam are enough to find them.
    """

    width: int
    num_candidates: int
    num_for_each: int
    num_answers: int
    length_penalty: float
    early_stopping: bool
    finished: list[tuple[float, Sequence, str]] = field(default_factory=list)  # best first
    can_improve: bool = True

    def go_on(self, beams: list[Sequence]) -> list[tuple[Sequence, Sequence]]:
        """(beam, its continuation) for the next step, none when the search is over. All beams have candidates."""
        following: list[tuple[Sequence, Sequence]] = []
        was_full = len(self.finished) == self.width
        num_looked_at = 0
        for place, (beam, rank) in enumerate(self._best(beams)):
            if place >= self.width and beam.stops.is_end(int(known(beam).ids[rank])):
                continue
            # A step's work is bounded: where nearly all texts are stop texts, the search has nothing to go on with.
            num_looked_at += 1
            if num_looked_at > _MAX_LOOKS * self.width or (len(following) == self.width and place >= self.width):
                break
            child = beam.child(rank)
            reason = child.stops.push(child.token_ids[-1]) or ("length" if len(child.token_ids) >= child.max_len else "")
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

    def answers(self, beams: list[Sequence], reason: str) -> list[Answer]:
        """The best num_answers beams. beams, reason: those that still ran when the search ended, and why it did.

        Where there are fewer (the search had not begun, or the rules of the request leave fewer), the last answers have no tokens.
        """
        unfinished = sorted(beams, key=lambda beam: -beam.beam_score)
        best: list[tuple[Sequence | None, str]] = [(sequence, why) for _, sequence, why in self.finished]
        best += [(sequence, reason) for sequence in unfinished]
        best += [(None, reason)] * (self.num_answers - len(best))
        return [Answer(sequence, index, why) for index, (sequence, why) in enumerate(best[: self.num_answers])]

    def end(self, sequence: Sequence, reason: str) -> list[Answer]:
        raise AssertionError("beams end together, by answers()")


def known(beam: Sequence) -> BeamCandidates:
    """The candidates of a beam that has them."""
    assert beam.candidates is not None
    return beam.candidates


# -- from a request to its sequences -----------------------------------------------------------------------------------


def group_of(request: Request, limits: ModelLimits, arrival: int, now_ns: int) -> SequenceGroup:
    """A request's group. Its sequences beside the first are followers of that, or, with beam search, come later."""
    params = request.params
    group = SequenceGroup(request, strategy_of(params, limits), request.arrival_ns or now_ns)
    if params.guide is not None and params.allowed_token_ids:
        group.allowed_bits = bits_of(params.allowed_token_ids, limits.vocab_size)
    seed = secrets.randbits(63) if params.seed is None else params.seed
    rules = stop_rules(params, limits)
    edits = edits_of(params, rules, len(request.prompt_ids), limits)
    num_samples = 1 if group.is_beam_search else params.num_sequences
    for index in range(num_samples):
        sampling = row_params(request, _seed_of_sample(seed, index), edits)
        order = (request.priority, arrival + index)
        stops, max_len = StopChecker(rules), max_len_of(request, limits)
        group.unfinished.append(Sequence(group, index, order, list(request.prompt_ids), max_len, stops, sampling, is_plain(request, sampling)))
    leader, *leader.followers = group.unfinished
    return group


def is_plain(request: Request, sampling: RowParams) -> bool:
    """True if nothing but tokens is asked for, and no logits have to be changed for them."""
    params = request.params
    changes = len(sampling.edits) or sampling.has_penalties or sampling.allowed or params.guide is not None
    reports = params.logprobs is not None or params.prompt_logprobs is not None or request.context_logits or request.generation_logits
    return not (changes or reports or params.picks_best)


def strategy_of(params: SamplingParams, limits: ModelLimits) -> Strategy:
    if params.beam_width > 1:
        width, num_ends = params.beam_width, len(end_ids_of(params, limits))
        num_candidates = max(2, 1 + num_ends) * width
        # Of one beam, the first `width` count, and the first `width` that do not end: at most num_ends lie between.
        num_for_each = min(max(2 * width, width + num_ends), limits.vocab_size)
        return BeamSearch(width, num_candidates, num_for_each, params.n, params.length_penalty, params.early_stopping)
    return BestOf(params.n, params.num_sequences) if params.picks_best else Samples()


def give_guides(group: SequenceGroup, make_guide: Callable[[], GuideState]) -> None:
    for sequence in group.unfinished:
        sequence.guide = make_guide()


def end_ids_of(params: SamplingParams, limits: ModelLimits) -> frozenset[int]:
    """The tokens that end this request's sequences."""
    # A complete answer to a grammar has nothing after it but the model's own end.
    if params.guide is not None:
        return limits.end_ids | frozenset(params.stop_token_ids)
    if params.ignore_eos or params.end_id == -1:
        return frozenset(params.stop_token_ids)
    return (limits.end_ids if params.end_id is None else frozenset([params.end_id])) | frozenset(params.stop_token_ids)


def stop_rules(params: SamplingParams, limits: ModelLimits) -> StopRules:
    return StopRules(
        shown=limits.vocabulary.table(params.skip_special_tokens),
        full=limits.vocabulary.full,
        end_ids=end_ids_of(params, limits),
        stops=tuple(stop_text(text.encode()) for text in params.stop_texts),
        includes_stop=params.include_stop_str_in_output,
        # A guide decides by itself when the answer may end.
        min_tokens_to_end=0 if params.guide is not None else params.min_tokens,
        min_tokens=params.min_tokens,
    )


def max_len_of(request: Request, limits: ModelLimits) -> int:
    """Tokens of prompt and answer together, at most."""
    num_prompt = len(request.prompt_ids)
    room = limits.max_model_len - num_prompt
    asked = request.params.max_tokens
    return num_prompt + (min(limits.max_output_tokens, room) if asked is None else min(asked, room))


def edits_of(params: SamplingParams, rules: StopRules, num_prompt: int, limits: ModelLimits) -> RowEdits:
    """All changes of single logits that the request asks for; one for each token, as far as they do not depend on what came before."""
    never, vocabulary = float("-inf"), limits.vocabulary
    biases = Counter(params.logit_bias)
    for word, bias in params.word_bias.items():
        biases.update({token: bias * count for token, count in Counter(vocabulary.encode(word)).items()})
    edits = [LogitEdit(token, bias) for token, bias in biases.items()]
    edits += [LogitEdit(ids[-1], never, prefix=ids[:-1]) for word in filter(None, params.bad_words) for ids in vocabulary.spellings(word)]
    edits = [edit for edit in edits if edit.token < limits.vocab_size]  # a tokenizer may have tokens that the model has not
    if rules.min_tokens_to_end:
        below = num_prompt + rules.min_tokens_to_end
        edits += [LogitEdit(token, never, below) for token in sorted(rules.end_ids) if token < limits.vocab_size]
    return RowEdits.of(edits) if edits else NO_EDITS


def row_params(request: Request, seed: int, edits: RowEdits) -> RowParams:
    params = request.params
    return RowParams(
        temperature=0.0 if params.beam_width > 1 or params.temperature < MIN_TEMPERATURE else params.temperature,
        top_k=max(params.top_k, 0),
        top_p=params.top_p,
        min_p=params.min_p,
        seed=seed,
        num_prompt=len(request.prompt_ids),
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        edits=edits,
        allowed=params.allowed_token_ids,
    )


def _seed_of_sample(seed: int, index: int) -> int:
    """The first sample has the request's own seed, the others seeds that follow from it."""
    if index == 0:
        return seed & (2**63 - 1)
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
