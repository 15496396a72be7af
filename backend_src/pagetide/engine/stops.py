"""Decides when a sequence ends, and which of its tokens may be shown: end-of-sequence ids, stop texts,
whole characters.

Works on bytes through the table token id -> bytes, so no tokenizer runs per step:
   released tokens | held tokens: their bytes end inside a character, or in what may become a stop text
"""

from __future__ import annotations

import copy
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import lru_cache


def num_incomplete_bytes(text: bytes | bytearray) -> int:
    """How many bytes at the end of text are the beginning of a UTF-8 character that is not whole yet (0 to
    3).
    """
    for length in range(1, min(len(text), 3) + 1):
        byte = text[-length]
        if byte >= 0xC0:  # begins a character; whether what follows fits, nobody can tell before it is there
            return length if length < _size_of_character(byte) and _may_go_on(text[-length:]) else 0
        if byte < 0x80:
            return 0
    return 0


def _size_of_character(first: int) -> int:
    return 2 if 0xC2 <= first <= 0xDF else 3 if 0xE0 <= first <= 0xEF else 4 if 0xF0 <= first <= 0xF4 else 1


def _may_go_on(text: bytes | bytearray) -> bool:
    """True if these bytes can be the beginning of a character (The Unicode Standard, table 3-7)."""
    if len(text) == 1:
        return True
    low, high = {0xE0: (0xA0, 0xBF), 0xED: (0x80, 0x9F), 0xF0: (0x90, 0xBF), 0xF4: (0x80, 0x8F)}.get(
        text[0], (0x80, 0xBF)
    )
    return low <= text[1] <= high


def _is_inside_character(text: bytearray, at: int) -> bool:
    """True if a character that begins before this place goes on behind it."""
    count = num_incomplete_bytes(text[max(0, at - 4) : at])
    if not count or at == len(text):
        return count > 0
    return 0x80 <= text[at] <= 0xBF and _may_go_on(text[at - count : at + 1])


class StopText:
    """A text that ends a sequence, searched for byte by byte (Knuth, Morris and Pratt 1977): each byte is
    looked at once.
    """

    def __init__(self, text: bytes):
        self.text = text
        self._fallback = _fallbacks(text)

    def advance(self, matched: int, following: bytes) -> tuple[int, int]:
        """Goes on from `matched` bytes that have been found so far.

        Returns how many are found at the end of `following`, and where in it the first whole text ends (-1:
        there is none).
        """
        text, fallback, end = self.text, self._fallback, -1
        if not matched and text[0] not in following:
            return 0, -1
        for at, byte in enumerate(following, 1):
            while matched and text[matched] != byte:
                matched = fallback[matched]
            matched += text[matched] == byte
            if matched == len(text):
                matched, end = fallback[matched], at if end < 0 else end
        return matched, end


def _fallbacks(text: bytes) -> list[int]:
    """For each length of a beginning of text: how long the longest proper beginning is that it ends with."""
    fallback, matched = [0, 0], 0
    for byte in text[1:]:
        while matched and text[matched] != byte:
            matched = fallback[matched]
        matched += text[matched] == byte
        fallback.append(matched)
    return fallback


@lru_cache(maxsize=1024)
def stop_text(text: bytes) -> StopText:
    return StopText(text)


@dataclass(frozen=True)
class StopRules:
    """When a sequence ends.

    shown: token id -> bytes that its text shows; full: with the texts of special tokens too, in which stop
    texts are found as well.
    end_ids, stops: tokens and texts that end it; includes_stop: they stay in the text.
    min_tokens: not before so many new tokens, but for early_ends, which always end it.
    """

    shown: Seq[bytes]
    full: Seq[bytes]
    end_ids: frozenset[int] = frozenset()
    stops: tuple[StopText, ...] = ()
    includes_stop: bool = False
    min_tokens: int = 0
    early_ends: frozenset[int] = frozenset()


class StopChecker:
    """Holds the tokens of one sequence that were sampled but not shown yet, and finds its end."""

    def __init__(self, rules: StopRules):
        self._rules = rules
        self._num_tokens = 0
        self._held_ids: list[int] = []
        self._held = bytearray()  # what the held tokens show
        self._matched = [0] * len(rules.stops)  # bytes of each stop text that the full text ends with
        self.num_cut = 0

    def copy(self) -> StopChecker:
        """For a child: goes on from here by itself."""
        following = copy.copy(self)
        following._held_ids, following._held, following._matched = (
            list(self._held_ids),
            self._held[:],
            list(self._matched),
        )
        return following

    def is_end(self, token: int) -> bool:
        """True if the sequence would end with this token, whatever its text."""
        return self._ends_at(token, self._num_tokens + 1)

    def _ends_at(self, token: int, num_tokens: int) -> bool:
        """True if the sequence ends with this token as its num_tokens-th."""
        rules = self._rules
        return token in rules.end_ids and (num_tokens >= rules.min_tokens or token in rules.early_ends)

    def push(self, token: int) -> str:
        """Takes the next token; returns `stop` if the sequence ends with it, else an empty string."""
        rules = self._rules
        self._num_tokens += 1
        self._held_ids.append(token)
        text = _bytes_of(rules.shown, token)
        self._held += text
        if self._ends_at(token, self._num_tokens):
            self.num_cut = 0 if rules.includes_stop else len(text)
            return "stop"
        return "stop" if rules.stops and self._find_stop_text(_bytes_of(rules.full, token)) else ""

    def _find_stop_text(self, text: bytes) -> bool:
        """Follows all stop texts through the full text of the last token; of those that end in it the one
        that begins first counts.
        """
        found = []
        for i, stop in enumerate(self._rules.stops):
            self._matched[i], end = stop.advance(self._matched[i], text)
            if end >= 0:
                found.append((len(text) - end + len(stop.text), len(text) - end))
        if not found or self._num_tokens < self._rules.min_tokens:
            return False
        with_stop, behind_stop = max(found)
        self.num_cut = self._num_shown_in_last(behind_stop if self._rules.includes_stop else with_stop)
        return True

    def _num_shown_in_last(self, num_bytes: int) -> int:
        """How many bytes the tokens show within the last num_bytes of their full text."""
        shown = 0
        for token in reversed(self._held_ids):
            if num_bytes <= 0:
                break
            full = _bytes_of(self._rules.full, token)
            if _bytes_of(self._rules.shown, token):
                shown += min(len(full), num_bytes)
            num_bytes -= len(full)
        return shown

    def take(self, is_last: bool) -> list[int]:
        """The tokens that may be shown now; all that are left if the sequence has ended.

        After the last call `num_cut` tells how many bytes at the end of their text do not count.
        """
        may_stop = any(self._matched)
        is_whole = not self._held or self._held[-1] < 0x80  # ends in a character of one byte
        if is_last or not (may_stop or (not is_whole and num_incomplete_bytes(self._held[-4:]))):
            ids, self._held_ids, self._held = self._held_ids, [], bytearray()
            return ids
        return self._take_before(len(self._held) - self._num_held_bytes())

    def _take_before(self, num_free: int) -> list[int]:
        """Releases the longest run of whole tokens within num_free bytes that ends at a character's border,
        and before any stop text may begin.
        """
        best, end, position = 0, 0, 0
        for count, token in enumerate(self._held_ids[: self._num_free_tokens()], 1):
            position += len(_bytes_of(self._rules.shown, token))
            if position > num_free:
                break
            if not _is_inside_character(self._held, position):
                best, end = count, position
        ids, self._held_ids, self._held = self._held_ids[:best], self._held_ids[best:], self._held[end:]
        return ids

    def _num_free_tokens(self) -> int:
        """How many of the held tokens lie before what may become a stop text."""
        matched, count = max(self._matched, default=0), len(self._held_ids)
        while matched > 0 and count:
            count -= 1
            matched -= len(_bytes_of(self._rules.full, self._held_ids[count]))
        return count

    def _num_held_bytes(self) -> int:
        """How many bytes at the end must not be shown yet."""
        return max(
            self._num_shown_in_last(max(self._matched, default=0)), num_incomplete_bytes(self._held[-4:])
        )


def _bytes_of(table: Seq[bytes], token: int) -> bytes:
    # A model's vocabulary may be padded beyond its tokenizer's.
    return table[token] if token < len(table) else b""
