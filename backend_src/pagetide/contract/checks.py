"""Whether a request's parameters are in range, go together, and can be run by the model: shared by every
way in.
"""

from __future__ import annotations

from collections.abc import Iterable

from pagetide.contract.fields import FIELDS, MAX_TOKEN_RULES, MAX_WORD_LENGTH, MAX_WORDS
from pagetide.contract.values import shown
from pagetide.types import EngineInfo, Request, RequestError, SamplingParams

MAX_LOGITS_BYTES = 2**31  # of one request; a message between processes holds at most twice as much


def check_params(params: SamplingParams) -> None:
    """Raises RequestError if a sampling parameter is out of range, or two do not go together."""
    for field in FIELDS:
        value = getattr(params, field.attribute) if field.attribute else None
        if value is not None and not field.is_allowed(value):
            raise RequestError(f"{field.name} is {shown(value)}, must be {field.allowed}")
    check_words("stop_words", params.stop_texts)
    check_words("bad_words", params.bad_words)
    check_words("embedding_bias_words", tuple(params.word_bias))
    for name in ("logit_bias", "stop_token_ids"):
        if len(getattr(params, name)) > MAX_TOKEN_RULES:
            raise RequestError(f"{name} has {len(getattr(params, name))} tokens, may have {MAX_TOKEN_RULES}")
    for token, bias in params.logit_bias.items():
        if not -100 <= bias <= 100:
            raise RequestError(f"logit_bias of token {token} is {bias}, must be from -100 to 100")
    _check_together(params)


def check_words(name: str, words: tuple[str, ...]) -> None:
    """Raises RequestError if there are more texts, or longer ones, than a step could look for."""
    if len(words) > MAX_WORDS or any(len(word) > MAX_WORD_LENGTH for word in words):
        longest = max(map(len, words))
        raise RequestError(
            f"{name} has {len(words)} texts of up to {longest} characters, may have {MAX_WORDS} of "
            f"up to {MAX_WORD_LENGTH}"
        )


def _check_together(params: SamplingParams) -> None:
    if params.max_tokens is not None and params.min_tokens > params.max_tokens:
        raise RequestError(
            f"min_tokens is {params.min_tokens}, must be at most max_tokens, which is {params.max_tokens}"
        )
    if params.best_of is not None and params.best_of < params.n:
        raise RequestError(
            f"best_of is {params.best_of}, must be at least num_return_sequences, which is {params.n}"
        )
    if params.beam_width == 1:
        return
    if params.n > params.beam_width:
        raise RequestError(
            f"num_return_sequences is {params.n}, must be at most beam_width, which is {params.beam_width}"
        )
    if params.best_of is not None:
        raise RequestError(
            f"best_of is {params.best_of} and beam_width {params.beam_width}; give one of them"
        )
    if params.guide is not None:
        raise RequestError(f"beam_width is {params.beam_width}, must be 1 with guided decoding")


def check_request(request: Request, engine: EngineInfo) -> None:
    """Raises RequestError if the model cannot run this request."""
    check_params(request.params)
    ids, params, size = request.prompt_ids, request.params, engine.vocab_size
    if not ids:
        raise RequestError("the prompt is empty, it must have at least one token")
    if len(ids) >= engine.max_model_len:
        limit = engine.max_model_len
        raise RequestError(
            f"the prompt has {len(ids)} tokens, must have at most {limit - 1} (max_model_len is {limit})"
        )
    tokens: list[tuple[str, Iterable[int]]] = [
        ("input_ids", ids),
        ("stop_token_ids", params.stop_token_ids),
        ("allowed_token_ids", params.allowed_token_ids),
        ("logit_bias", params.logit_bias),
    ]
    for name, listed in tokens:
        wrong = next((token for token in listed if not 0 <= token < size), None)
        if wrong is not None:
            raise RequestError(f"{name} has the token id {wrong}, must be from 0 to {size - 1}")
    if params.num_sequences > engine.max_num_seqs:
        name = (
            "beam_width" if params.beam_width > 1 else "best_of" if params.best_of else "num_return_sequences"
        )
        raise RequestError(
            f"{name} is {params.num_sequences}, must be at most {engine.max_num_seqs} (the setting "
            "max_num_seqs)"
        )
    if params.end_id is not None and params.end_id >= size:
        raise RequestError(f"end_id is {params.end_id}, must be from -1 to {size - 1}")
    if (request.context_logits or request.generation_logits) and not engine.allows_logits:
        raise RequestError(
            "return_context_logits and return_generation_logits are refused here (the setting "
            "allow_logits is false)"
        )
    if request.generation_logits and params.beam_width > 1:
        raise RequestError(
            "return_generation_logits does not go with beam search (beam_width is "
            f"{params.beam_width}); leave one of them out"
        )
    _check_logits_size(request, engine)
    _check_beams(request, engine)


def _check_logits_size(request: Request, engine: EngineInfo) -> None:
    """Logits are kept until they are sent: those of one request must not fill the memory."""
    num_prompt, params = len(request.prompt_ids), request.params
    room = max(0, engine.max_model_len - num_prompt)
    num_new = room if params.max_tokens is None else min(room, params.max_tokens)
    positions = num_prompt if request.context_logits else 0
    if request.generation_logits and not request.stream:
        positions += num_new * params.num_sequences
    size = positions * engine.vocab_size * 4
    if size > MAX_LOGITS_BYTES:
        raise RequestError(
            f"the logits of this request may take {size / 2**30:.1f} GiB, must be at most "
            f"{MAX_LOGITS_BYTES / 2**30:g}; ask for fewer tokens (max_tokens) or answers, or stream them"
        )


def _check_beams(request: Request, engine: EngineInfo) -> None:
    """All beams of a search must fit into the cache together."""
    params = request.params
    longest = min(len(request.prompt_ids) + (params.max_tokens or engine.max_model_len), engine.max_model_len)
    needed = params.beam_width * (-(-longest // engine.block_size) + 1)
    if params.beam_width > 1 and needed > engine.num_blocks:
        raise RequestError(
            f"beam_width is {params.beam_width}: with up to {longest} tokens the beams may need "
            f"{needed} KV blocks and there are "
            f"{engine.num_blocks}; ask for fewer beams or a smaller max_tokens"
        )
