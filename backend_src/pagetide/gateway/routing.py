"""Which of several Tritons is asked first: the one whose prefix cache is likely to hold how the prompt
begins, unless it has more than its share to do.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any, Protocol, TypeVar

_LEADING_TEXT = 256  # characters of a text
_LEADING_MESSAGES, _LEADING_CHARACTERS = 2, 4096  # of a chat: usually its system's words and first question
_LEADING_IDS = 64
_MOST = 1.25  # times the mean of what all have to do


class Routed(Protocol):
    """url: what it is known by. num_open: requests that it answers now. rests_until: it has failed, and comes
    last until then.
    """

    url: str
    num_open: int
    rests_until: float


Server = TypeVar("Server", bound=Routed)


def leading(prompt: Mapping[str, Any]) -> bytes:
    """What prompts have in common whose caches are worth sharing: later turns of a chat have what the first
    had, and completions that begin alike are often of one kind.
    """
    if "input_ids" in prompt:
        return json.dumps(prompt["input_ids"][:_LEADING_IDS]).encode()
    if "messages" in prompt:
        first = json.dumps(prompt["messages"][:_LEADING_MESSAGES], sort_keys=True)
        return first[:_LEADING_CHARACTERS].encode()
    return prompt.get("text_input", "")[:_LEADING_TEXT].encode(errors="replace")


def in_order(servers: Sequence[Server], key: bytes, now: float) -> list[Server]:
    """All servers, the best for this key first: consistent hashing with bounded loads (Mirrokni, Thorup and
    Zadimoghaddam, 2018), by highest random weight, so that one server more or less moves only its own keys.
    """
    limit = ceil(_MOST * (1 + sum(server.num_open for server in servers)) / len(servers))

    def rank(server: Server) -> tuple[bool, bool, bytes]:
        weight = hashlib.blake2b(key, key=server.url.encode()[:64], digest_size=8).digest()
        return server.rests_until > now, server.num_open >= limit, weight

    return sorted(servers, key=rank)
