"""From a request to its sequences: what of it the engine needs in every step, worked out once."""

from __future__ import annotations

import hashlib
import secrets
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from pagetide.engine.guides import GuideState
from pagetide.engine.sequence import Search, Sequence, SequenceGroup, Strategy
from pagetide.engine.stops import StopChecker, StopRules, stop_text
from pagetide.engine.strategies import BeamSearch, BestOf, Samples
from pagetide.runner.plan import NO_EDITS, LogitEdit, RowEdits, RowParams, bits_of
from pagetide.text.tokens import Vocabulary
from pagetide.types import MIN_TEMPERATURE, Request, SamplingParams


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


def group_of(request: Request, limits: ModelLimits, turn: float, arrival: int, now_ns: int) -> SequenceGroup:
    """A request's group. turn, arrival: when it is served, beside others of its priority.

    Its sequences beside the first are followers of that, or, with beam search, come later.
    """
    params = request.params
    search = search_of(params, limits)
    group = SequenceGroup(request, search or strategy_of(params), search, request.arrival_ns or now_ns)
    if params.guide is not None and params.allowed_token_ids:
        group.allowed_bits = bits_of(params.allowed_token_ids, limits.vocab_size)
    seed = secrets.randbits(63) if params.seed is None else params.seed
    rules = stop_rules(params, limits)
    edits = edits_of(params, rules, len(request.prompt_ids), limits)
    num_samples = 1 if group.is_beam_search else params.num_sequences
    for index in range(num_samples):
        sampling = row_params(request, _seed_of_sample(seed, index), edits)
        order = (request.priority, turn, arrival + index)
        stops, max_len = StopChecker(rules), max_len_of(request, limits)
        prompt, plain = list(request.prompt_ids), is_plain(request, sampling)
        group.unfinished.append(Sequence(group, index, order, prompt, max_len, stops, sampling, plain))
    leader, *leader.followers = group.unfinished
    return group


def is_plain(request: Request, sampling: RowParams) -> bool:
    """True if nothing but tokens is asked for, and no logits have to be changed for them."""
    params = request.params
    changes = len(sampling.edits) or sampling.has_penalties or sampling.allowed or params.guide is not None
    reports = (
        params.logprobs is not None
        or params.prompt_logprobs is not None
        or request.context_logits
        or request.generation_logits
    )
    return not (changes or reports or params.picks_best)


def search_of(params: SamplingParams, limits: ModelLimits) -> Search | None:
    """The beam search that a request asks for; None where it asks for samples."""
    if params.beam_width == 1:
        return None
    width, num_ends = params.beam_width, len(end_ids_of(params, limits))
    num_candidates = max(2, 1 + num_ends) * width
    # Of one beam, the first `width` count, and the first `width` that do not end: at most num_ends lie
    # between.
    num_for_each = min(max(2 * width, width + num_ends), limits.vocab_size)
    return BeamSearch(
        width, num_candidates, num_for_each, params.n, params.length_penalty, params.early_stopping
    )


def strategy_of(params: SamplingParams) -> Strategy:
    """How a request without beams makes answers of its samples."""
    return BestOf(params.n, params.num_sequences) if params.picks_best else Samples()


def give_guides(group: SequenceGroup, make_guide: Callable[[], GuideState]) -> None:
    """Gives each sequence of a group its own state of the compiled grammar."""
    for sequence in group.unfinished:
        sequence.guide = make_guide()


def end_ids_of(params: SamplingParams, limits: ModelLimits) -> frozenset[int]:
    """The tokens that end this request's sequences."""
    # A complete answer to a grammar has nothing after it but the model's own end.
    if params.guide is not None:
        return limits.end_ids | frozenset(params.stop_token_ids)
    if params.ignore_eos or params.end_id == -1:
        return frozenset(params.stop_token_ids)
    return (limits.end_ids if params.end_id is None else frozenset([params.end_id])) | frozenset(
        params.stop_token_ids
    )


def stop_rules(params: SamplingParams, limits: ModelLimits) -> StopRules:
    """What ends an answer to these parameters, and what of it may be shown."""
    return StopRules(
        shown=limits.vocabulary.table(params.skip_special_tokens),
        full=limits.vocabulary.full,
        end_ids=end_ids_of(params, limits),
        stops=tuple(stop_text(text.encode()) for text in params.stop_texts),
        includes_stop=params.include_stop_str_in_output,
        min_tokens=params.min_tokens,
        # A guide decides by itself when the answer may end.
        early_ends=limits.end_ids if params.guide is not None else frozenset(),
    )


def max_len_of(request: Request, limits: ModelLimits) -> int:
    """Tokens of prompt and answer together, at most."""
    num_prompt = len(request.prompt_ids)
    room = limits.max_model_len - num_prompt
    asked = request.params.max_tokens
    return num_prompt + (min(limits.max_output_tokens, room) if asked is None else min(asked, room))


def edits_of(params: SamplingParams, rules: StopRules, num_prompt: int, limits: ModelLimits) -> RowEdits:
    """All changes of single logits that the request asks for; one for each token, as far as they do not
    depend on what came before.
    """
    never, vocabulary = float("-inf"), limits.vocabulary
    biases = Counter(params.logit_bias)
    for word, bias in params.word_bias.items():
        biases.update({token: bias * count for token, count in Counter(vocabulary.encode(word)).items()})
    edits = [LogitEdit(token, bias) for token, bias in biases.items()]
    edits += [
        LogitEdit(ids[-1], never, prefix=ids[:-1])
        for word in filter(None, params.bad_words)
        for ids in vocabulary.spellings(word)
    ]
    edits = [
        edit for edit in edits if edit.token < limits.vocab_size
    ]  # a tokenizer may have tokens that the model has not
    if params.min_tokens and params.guide is None:
        below = num_prompt + params.min_tokens
        edits += [
            LogitEdit(token, never, below) for token in sorted(rules.end_ids) if token < limits.vocab_size
        ]
    return RowEdits.of(edits) if edits else NO_EDITS


def row_params(request: Request, seed: int, edits: RowEdits) -> RowParams:
    """A row's sampling parameters as the device takes them; beams and temperatures near 0 are greedy."""
    params = request.params
    return RowParams(
        temperature=0.0
        if params.beam_width > 1 or params.temperature < MIN_TEMPERATURE
        else params.temperature,
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
