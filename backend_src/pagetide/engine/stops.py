"""Decides when a sequence ends, and which of its tokens may be shown: end-of-sequence ids, stop texts, whole characters.

Works on bytes through the table token id -> bytes, so no tokenizer runs per step:
   released tokens | held tokens: their bytes end inside a character, or in what may become a stop text
"""

from __future__ import annotations

import codecs
import copy
from collections.abc import Sequence as Seq
from dataclasses import dataclass

_utf8 = codecs.getincrementaldecoder("utf-8")


def num_incomplete_bytes(text: bytes) -> int:
    """How many bytes at the end of text are the beginning of a UTF-8 character that is not whole yet (0 to 3)."""
    decoder = _utf8("replace")
    decoder.decode(text[-8:] if len(text) > 8 else text)
    return len(decoder.getstate()[0])


def num_matching_at_end(text: bytes, stop: bytes) -> int:
    """Length of the longest end of text that is a proper beginning of stop."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


@dataclass(frozen=True)
class StopRules:
    """When a sequence ends. token_bytes: id -> bytes of the text that counts.

    end_ids, stops: tokens and texts that end it; includes_stop: they stay in the text.
    min_tokens_to_end, min_tokens: not before so many new tokens, for end_ids and for stops.
    """

    token_bytes: Seq[bytes]
    end_ids: frozenset[int] = frozenset()
    stops: tuple[bytes, ...] = ()
    includes_stop: bool = False
    min_tokens_to_end: int = 0
    min_tokens: int = 0


class StopChecker:
    """Holds the tokens of one sequence that were sampled but not shown yet, and finds its end."""

    def __init__(self, rules: StopRules):
        self._rules = rules
        self._token_bytes = rules.token_bytes
        self._num_tokens = 0
        self._held_ids: list[int] = []
        self._held = b""
        self.num_cut = 0

    def copy(self) -> StopChecker:
        following = copy.copy(self)
        following._held_ids = list(self._held_ids)
        return following

    def push(self, token: int) -> str:
        """Takes the next token; returns `stop` if the sequence ends with it, else an empty string."""
        rules = self._rules
        self._num_tokens += 1
        self._held_ids.append(token)
        text = self._bytes_of(token)
        self._held += text
        if token in rules.end_ids and self._num_tokens >= rules.min_tokens_to_end:
            self.num_cut = 0 if rules.includes_stop else len(text)
            return "stop"
        return "stop" if rules.stops and self._num_tokens >= rules.min_tokens and self._find_stop_text() else ""

    def _find_stop_text(self) -> bool:
        found = [(at, len(stop)) for stop in self._rules.stops if (at := self._held.find(stop)) >= 0]
        if found:
            at, length = min(found)
            self.num_cut = len(self._held) - at - (length if self._rules.includes_stop else 0)
        return bool(found)

    def take(self, is_last: bool) -> list[int]:
        """The tokens that may be shown now; all that are left if the sequence has ended.

        After the last call `num_cut` tells how many bytes at the end of their text do not count.
        """
        if is_last or not self._num_held_bytes():
            ids, self._held_ids, self._held = self._held_ids, [], b""
            return ids
        return self._take_before(len(self._held) - self._num_held_bytes())

    def _take_before(self, num_free: int) -> list[int]:
        """Releases the longest run of whole tokens within num_free bytes that ends at a character's border."""
        best, end, position = 0, 0, 0
        for count, token in enumerate(self._held_ids, 1):
            position += len(self._bytes_of(token))
            if position > num_free:
                break
            if not num_incomplete_bytes(self._held[:position]):
                best, end = count, position
        ids, self._held_ids, self._held = self._held_ids[:best], self._held_ids[best:], self._held[end:]
        return ids

    def _bytes_of(self, token: int) -> bytes:
        # A model's vocabulary may be padded beyond its tokenizer's.
        return self._token_bytes[token] if token < len(self._token_bytes) else b""

    def _num_held_bytes(self) -> int:
        """How many bytes at the end must not be shown yet."""
        matching = max((num_matching_at_end(self._held, stop) for stop in self._rules.stops), default=0)
        return max(matching, num_incomplete_bytes(self._held))
