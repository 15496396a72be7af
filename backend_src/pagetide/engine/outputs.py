"""From a step's tokens to what clients get: scores and logits find their sequences, tokens their outputs."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from typing import NamedTuple

import numpy as np

from pagetide.engine.plan_builder import StepSequences, samples_first
from pagetide.engine.sequence import Answer, Sequence, SequenceGroup
from pagetide.engine.statistics import Observations
from pagetide.runner.plan import BeamCandidates, StepPlan, StepTokens, TokenScores
from pagetide.types import Output, TokenScore

_UNLIKELY = -9999.0  # log-probability of an answer without tokens: very small, but finite


class SampledToken(NamedTuple):
    """What a step has for one sequence. score, candidates, logits [vocabulary]: as the plan asked."""

    sequence: Sequence
    token: int
    score: TokenScore | None = None
    candidates: BeamCandidates | None = None
    logits: np.ndarray | None = None


def sampled_tokens(plan: StepPlan, sequences: StepSequences, tokens: StepTokens) -> list[SampledToken]:
    """A step's tokens in the plan's order.

    What the step has to say of prompts goes to their groups at once.
    """
    sampled = zip(sequences.sampling, tokens.ids.tolist(), strict=True)
    if not (len(plan.score_index) or len(plan.beam_index) or len(plan.return_index)):
        return [SampledToken(*one) for one in sampled]
    scores = dict(zip(plan.score_index.tolist(), _rows_of_scores(tokens.scores), strict=True))
    returned: Seq[np.ndarray] = () if tokens.logits is None else list(tokens.logits)
    logits = dict(zip(plan.return_index.tolist(), returned, strict=True))
    candidates = dict(zip(plan.beam_index.tolist(), _rows_of_candidates(tokens.candidates), strict=True))
    for at, sequence in enumerate(sequences.of_prompt_tokens, len(sequences.sampling)):
        if at in scores:
            num_top = sequence.group.params.prompt_logprobs or 0
            sequence.group.prompt_scores.append(with_top(scores[at], num_top))
        if sequence.request.context_logits:
            sequence.group.context_logits.append(logits[at])
    found = []
    for at, (sequence, token) in enumerate(sampled):
        # The logits behind the prompt's last token belong to the prompt, too.
        if at in logits and sequence.request.context_logits and samples_first(sequence):
            sequence.group.context_logits.append(logits[at])
        found.append(SampledToken(sequence, token, scores.get(at), candidates.get(at), logits.get(at)))
    return found


def keep_report(sampled: SampledToken) -> None:
    """Keeps the token's score and logits until the token is shown."""
    sequence, score = sampled.sequence, sampled.score
    if score is not None:
        sequence.cumulative_logprob += score.logprob
        sequence.scores.append(with_top(score, sequence.group.params.logprobs or 0))
    if sequence.request.generation_logits and sampled.logits is not None:
        sequence.logits.append(sampled.logits)


def _rows_of_scores(scores: TokenScores | None) -> list[TokenScore]:
    if scores is None:
        return []
    columns = (column.tolist() for column in vars(scores).values())
    return [TokenScore(*row) for row in zip(*columns, strict=True)]


def _rows_of_candidates(found: BeamCandidates | None) -> list[BeamCandidates]:
    """The candidates of each beam by itself: [k] each, and its top_ids and top_logprobs [w]."""
    if found is None:
        return []
    return [BeamCandidates(*(column[i] for column in vars(found).values())) for i in range(len(found.ids))]


def with_top(score: TokenScore, num_top: int) -> TokenScore:
    """The score with as many alternatives as its request has asked for; others in the step may want more."""
    return TokenScore(score.logprob, score.rank, score.top_ids[:num_top], score.top_logprobs[:num_top])


def no_token_left(sequence: Sequence) -> str:
    """What the client is told of an answer that cannot go on."""
    count = len(sequence.token_ids) - sequence.num_prompt
    return (
        f"no token is left to choose after {count} tokens of the answer: the request's rules (a grammar, "
        "allowed_token_ids, bad_words, min_tokens, biases) exclude all together, or the model's logits are "
        "no finite numbers"
    )


class OutputQueue:
    """The outputs since they were last taken. observed: gets the pace of each answer."""

    def __init__(self, observed: Observations):
        self._observed = observed
        self._outputs: list[Output] = []

    def __len__(self) -> int:
        return len(self._outputs)

    def take(self) -> list[Output]:
        """What has come since the last call, in order; the queue is empty then."""
        outputs, self._outputs = self._outputs, []
        return outputs

    def add_tokens(self, sequence: Sequence) -> None:
        """What may be shown of a sequence that goes on; nothing, perhaps."""
        if ids := sequence.stops.take(is_last=False):
            self._add(sequence, sequence.index, ids, "")

    def add_answers(self, group: SequenceGroup, answers: Iterable[Answer]) -> None:
        """The ends of answers, with all that has not been shown of them."""
        for answer in answers:
            if answer.sequence is None:
                self._add_empty(group, answer)
                continue
            self._observe_pace(answer.sequence)
            ids = answer.sequence.stops.take(is_last=True)
            self._add(answer.sequence, answer.index, ids, answer.reason)

    def _add(self, sequence: Sequence, index: int, ids: list[int], reason: str) -> None:
        group = sequence.group
        if not (group.reports_tokens or group.reports_prompt):
            cut = sequence.stops.num_cut if reason else 0
            plain = Output(
                group.request.number, index, ids, cut, reason, group.num_cached, timings=group.timings
            )
            self._outputs.append(plain)
            return
        scores, sequence.scores = sequence.scores[: len(ids)], sequence.scores[len(ids) :]
        logits, sequence.logits = sequence.logits[: len(ids)], sequence.logits[len(ids) :]
        prompt_scores, context_logits = _of_prompt(group, index)
        output = Output(
            number=group.request.number,
            index=index,
            ids=ids,
            num_cut=sequence.stops.num_cut if reason else 0,
            finish_reason=reason,
            num_cached_tokens=group.num_cached,
            cumulative_logprob=sequence.cumulative_logprob,
            scores=scores if group.params.logprobs is not None else [],
            prompt_scores=prompt_scores,
            context_logits=context_logits,
            generation_logits=_joined(logits),
            timings=group.timings,
        )
        self._outputs.append(output)

    def _add_empty(self, group: SequenceGroup, answer: Answer) -> None:
        prompt_scores, context_logits = _of_prompt(group, answer.index)
        output = Output(
            number=group.request.number,
            index=answer.index,
            ids=[],
            finish_reason=answer.reason,
            num_cached_tokens=group.num_cached,
            cumulative_logprob=_UNLIKELY,
            prompt_scores=prompt_scores,
            context_logits=context_logits,
            timings=group.timings,
        )
        self._outputs.append(output)

    def _observe_pace(self, sequence: Sequence) -> None:
        num_tokens, group = len(sequence.token_ids) - sequence.num_prompt, sequence.group
        if num_tokens > 1:
            seconds = (group.last_token_ns - group.first_token_ns) / 1e9
            self._observed.tpot_s.append(seconds / (num_tokens - 1))


def _of_prompt(group: SequenceGroup, index: int) -> tuple[list[TokenScore], bytes]:
    """What has come of the prompt since the last output of answer 0, which alone has it."""
    if index:
        return [], b""
    scores, group.prompt_scores = group.prompt_scores, []
    logits, group.context_logits = group.context_logits, []
    return scores, _joined(logits)


def _joined(rows: list[np.ndarray]) -> bytes:
    return b"".join(row.tobytes() for row in rows)
