"""How a request becomes sequences: one, or several samples that share the prompt's blocks."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from pagetide.engine.sequence import Sequence
from pagetide.engine.stops import StopChecker
from pagetide.types import Request


@dataclass(frozen=True)
class ModelLimits:
    """What the engine knows of the model and the settings.

    token_bytes: token id -> its text in bytes. end_ids: the model's own end-of-sequence tokens.
    max_output_tokens: cap for requests that name no max_tokens.
    """

    token_bytes: Seq[bytes]
    end_ids: frozenset[int]
    max_model_len: int
    max_output_tokens: int


def sequences_of(request: Request, limits: ModelLimits, arrival: int) -> Sequence:
    """The sequence that computes the request's prompt; further samples are its followers."""
    params = request.params
    seed = secrets.randbits(63) if params.seed is None else params.seed
    leader, *followers = (_make_sequence(request, index, _seed_of_sample(seed, index), limits, arrival) for index in range(params.n))
    leader.followers = followers
    return leader


def end_ids_of(request: Request, limits: ModelLimits) -> frozenset[int]:
    """The tokens that end this request's sequences."""
    params = request.params
    if params.ignore_eos or params.end_id == -1:
        return frozenset()
    return limits.end_ids if params.end_id is None else frozenset([params.end_id])


def _make_sequence(request: Request, index: int, seed: int, limits: ModelLimits, arrival: int) -> Sequence:
    params = request.params
    num_prompt = len(request.prompt_ids)
    room = limits.max_model_len - num_prompt
    max_tokens = min(limits.max_output_tokens, room) if params.max_tokens is None else min(params.max_tokens, room)
    stops = tuple(text.encode() for text in params.stop_texts)
    checker = StopChecker(limits.token_bytes, end_ids_of(request, limits), stops, params.min_tokens)
    return Sequence(request, index, seed, list(request.prompt_ids), num_prompt, num_prompt + max_tokens, checker, arrival)


def _seed_of_sample(seed: int, index: int) -> int:
    """The first sample has the request's own seed, the others seeds that follow from it."""
    if index == 0:
        return seed & (2**63 - 1)
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
