"""Speculative decoding: guesses of a sequence's next tokens, which one step verifies all together
(arXiv:2211.17192).

The noise that a token is drawn with is a function of the request's seed and the token's position. So the step
draws behind each guess exactly what it would have drawn had the guess been the answer's token: as long as
guesses agree with what is drawn they are the answer, and what was drawn behind the first that does not is
thrown away. So guesses change no answer, where a token's logits do not depend on how many tokens a step has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

_MOST_NOTED = 2048  # tokens of a prompt in one step, which takes a millisecond or two
_TILE = 16
_FORGETS = 0.9  # how much of what has been seen of guesses counts as much after the next ones
_RIGHT, _WRONG = 2.0, 1.0  # seen of a sequence's guesses before there were any


class Drafter(Protocol):
    """Guesses the tokens of one sequence."""

    def propose(self, token_ids: list[int], count: int) -> list[int]:
        """Up to count tokens that may come next; none where nothing is to be guessed. token_ids: all so far,
        which only become more.
        """


class Places:
    """By runs of num_alike tokens: the place behind where they stood last, among those that end behind a
    sequence's first `begin` tokens.
    """

    def __init__(self, num_alike: int, begin: int = 0):
        self._num_alike = num_alike
        self._behind: dict[tuple[int, ...], int] = {}
        self._num_noted = max(begin, num_alike - 1)

    def note(self, token_ids: list[int], end: int) -> None:
        """Notes the runs that end among the first `end` tokens, of many in a row not all at once."""
        size, until = self._num_alike, min(end, self._num_noted + _MOST_NOTED)
        for place in range(self._num_noted + 1, until + 1):
            self._behind[tuple(token_ids[place - size : place])] = place
        self._num_noted = max(self._num_noted, until)

    def find(self, run: tuple[int, ...]) -> int | None:
        return self._behind.get(run)


class PromptLookup:
    """Guesses what followed the last num_alike tokens where they stood last, in the answer or in the prompt
    (github.com/apoorvumang/prompt-lookup-decoding): right where an answer quotes, edits or repeats.

    prompt: of the first num_prompt tokens, which may be those of other sequences too.
    """

    def __init__(self, num_alike: int, prompt: Places, num_prompt: int):
        self._num_alike, self._num_prompt = num_alike, num_prompt
        self._prompt, self._answer = prompt, Places(num_alike, num_prompt)

    def propose(self, token_ids: list[int], count: int) -> list[int]:
        num_before = len(token_ids) - 1  # the last run is the one that is looked for
        self._prompt.note(token_ids, min(self._num_prompt, num_before))
        self._answer.note(token_ids, num_before)
        run = tuple(token_ids[-self._num_alike :])
        begin = self._answer.find(run) or self._prompt.find(run)
        guesses = token_ids[begin : begin + count] if begin else []
        while guesses and len(guesses) < count:  # what stood there led to here, and may do so again
            guesses += guesses[: count - len(guesses)]
        return guesses


@dataclass(frozen=True)
class Speculation:
    """How far the engine guesses.

    longest: guesses of a sequence in one step, at most. num_alike: of PromptLookup. num_free: tokens
    that take a step about as long as reading the weights does, which one of few tokens waits for.
    """

    longest: int
    num_alike: int
    num_free: int

    def speculators(self, num_sequences: int, num_prompt: int) -> list[Speculator]:
        """For the sequences of a request, whose prompt has so many tokens."""
        prompt = Places(self.num_alike)
        return [Speculator(PromptLookup(self.num_alike, prompt, num_prompt)) for _ in range(num_sequences)]

    def room(self, budget: int, num_running: int) -> int:
        """For how many guesses of each sequence a step has room: three quarters of its budget are left to
        prompts.
        """
        return budget // 4 // num_running

    def most(self, budget: int, max_running: int) -> int:
        """So many guesses of each of max_running sequences are at least as many as any step has."""
        return min(self.longest, -(-(budget // 4) // max_running))

    def worthwhile(self, num_running: int, rate: float) -> int:
        """How many guesses of a sequence are worth their time beside so many sequences, if each is right at
        this rate once those before it are.

        A step takes num_free + tokens, in units of one token, and a sequence gets one token of it: another
        guess pays if its chance to be right is larger than its share of the time.
        """
        share = num_running / (num_running + self.num_free)
        return min(self.longest, int(math.log(share) / math.log(rate)))

    def pays(self, num_running: int, speculators: Sequence[Speculator]) -> bool:
        """Whether the guesses that these have now are worth their time all together: the products of a step
        take its tokens by the tile, so that a few more can cost as much as a tile of them.
        """
        num_guesses = sum(len(speculator.guesses) for speculator in speculators)
        tokens = sum(speculator.expected for speculator in speculators)
        more = _tiles(num_running + num_guesses) - _tiles(num_running)
        return tokens / num_running > more * _TILE / (num_running + self.num_free)


def _tiles(num_tokens: int) -> int:
    return -(-num_tokens // _TILE)


class Speculator:
    """The guesses of one sequence.

    guesses: of the step under way, as far as they have not been verified. num_lost: tokens that the step
    will yet bring from behind a wrong guess. is_ahead: the device counts tokens as computed that were thrown
    away.
    """

    def __init__(self, drafter: Drafter):
        self._drafter = drafter
        self._right, self._wrong = _RIGHT, _WRONG
        self.guesses: list[int] = []
        self.num_lost = 0
        self.is_ahead = False

    @property
    def rate(self) -> float:
        """How often a guess was right of late."""
        return self._right / (self._right + self._wrong)

    @property
    def expected(self) -> float:
        """How many of the guesses are right, on average."""
        return sum(self.rate**place for place in range(1, len(self.guesses) + 1))

    def guess(self, token_ids: list[int], count: int) -> None:
        """Makes up to count guesses for the next step."""
        self.guesses = self._drafter.propose(token_ids, count) if count > 0 else []
        # What is known of guesses fades, also while there are none: others may be better.
        self._right = _RIGHT + (self._right - _RIGHT) * _FORGETS
        self._wrong = _WRONG + (self._wrong - _WRONG) * _FORGETS

    def forget(self) -> None:
        """Takes back guesses that no step has run; the sequence has lost its row."""
        self.guesses, self.is_ahead = [], False

    def verify(self, token: int) -> bool:
        """Whether the next guess is the token that was drawn in its place; if not, nothing of the others
        remains.
        """
        is_right = self.guesses.pop(0) == token
        if is_right:
            self._right += 1
        else:
            self._wrong += 1
            self.num_lost, self.guesses = len(self.guesses) + 1, []
            self.is_ahead = True
        return is_right
