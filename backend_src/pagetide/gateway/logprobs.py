"""The contract's log-probabilities, {token id: {logprob, rank, decoded_token}} for each token with its own
entry first, in the two shapes that OpenAI's API has for them.
"""

from __future__ import annotations

from typing import Any


def chat_logprobs(found: dict[str, Any] | None, num_top: int) -> dict[str, Any] | None:
    """{"content": [{token, logprob, bytes, top_logprobs}, ...]}; num_top: likeliest tokens to be shown."""
    entries = (found or {}).get("logprobs")
    if not entries:
        return None
    return {"content": [_chat_token(list(entry.values()), num_top) for entry in entries], "refusal": None}


def _chat_token(candidates: list[dict[str, Any]], num_top: int) -> dict[str, Any]:
    ranked = sorted(candidates, key=lambda one: one["rank"])
    return {**_scored(candidates[0]), "top_logprobs": [_scored(one) for one in ranked[:num_top]]}


def _scored(candidate: dict[str, Any]) -> dict[str, Any]:
    token = candidate["decoded_token"]
    # Part of a character has no text of its own; its bytes are told then.
    raw = candidate.get("bytes") or list(token.encode())
    return {"token": token, "logprob": candidate["logprob"], "bytes": raw}


Entries = list[dict[str, Any] | None]  # the first token of a prompt has none


def completion_logprobs(entries: Entries, offset: int, first: str) -> dict[str, Any]:
    """{tokens, token_logprobs, top_logprobs, text_offset}; offset: characters before the first token; first:
    the text of the token without an entry.
    """
    shown: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for entry in entries:
        candidates = list(entry.values()) if entry else []
        token = candidates[0]["decoded_token"] if candidates else first
        shown["tokens"].append(token)
        shown["token_logprobs"].append(candidates[0]["logprob"] if candidates else None)
        tops = {one["decoded_token"]: one["logprob"] for one in candidates}
        shown["top_logprobs"].append(tops if candidates else None)
        shown["text_offset"].append(offset)
        offset += len(token)
    return shown


def first_token(prompt: str, entries: Entries) -> str:
    """The text of a prompt's first token: what its other tokens leave of it."""
    others = "".join(next(iter(entry.values()))["decoded_token"] for entry in entries if entry)
    return prompt.removesuffix(others) if prompt.endswith(others) else ""
