"""What keeps a server useful that is asked for more than it can do: users take turns, and who would wait too
long is told so at once.
"""

from __future__ import annotations

from bisect import bisect
from collections import Counter
from math import ceil

from pagetide.engine.sequence import Sequence
from pagetide.types import QueueFullError, Request

_SMOOTHING = 1 / 32  # weight of the newest observation
_FIRST_ANSWER = 64  # tokens, until any answer has ended
_MANY_USERS = 4096


class Turns:
    """Fair queueing between users, in tokens: however many requests one of them has waiting, the others' come
    in between. A request's turn is the virtual time at which it would begin if all who wait were served side
    by side; that time goes on by what is served, divided by the number of users who wait, so that those who
    come later, however many, come behind (Demers, Keshav and Shenker, SIGCOMM 1989; Goyal, Vin and Cheng,
    SIGCOMM 1996).
    """

    def __init__(self) -> None:
        self._now = 0.0
        self._ends: dict[tuple[int, str], float] = {}  # of each user's last request, by priority
        self._waiting: Counter[tuple[int, str]] = Counter()  # requests of each
        self._mean_answer = float(_FIRST_ANSWER)

    def next_turn(self, request: Request) -> float:
        """Of a request that comes now; lower ones are served first."""
        return max(self._now, self._ends.get(_who(request), 0.0))

    def take(self, request: Request) -> tuple[float, int]:
        """Its turn, and what it is likely to cost: the next of its user is later by that."""
        who, turn, params = _who(request), self.next_turn(request), request.params
        mean = round(self._mean_answer)
        answer = mean if params.max_tokens is None else min(params.max_tokens, mean)
        cost = len(request.prompt_ids) + answer * params.num_sequences
        self._ends[who] = turn + cost
        self._waiting[who] += 1
        if len(self._ends) > _MANY_USERS:
            self._ends = {who: end for who, end in self._ends.items() if who in self._waiting}
        return turn, cost

    def note_start(self, request: Request, cost: int) -> None:
        """It waits no more, but runs."""
        self._now += cost / len(self._waiting)
        self._leave(_who(request))

    def note_end(self, request: Request, cost: int) -> None:
        """It has never run, and its user owes nothing for it."""
        who = _who(request)
        if who in self._ends:
            self._ends[who] -= cost
        self._leave(who)

    def _leave(self, who: tuple[int, str]) -> None:
        self._waiting[who] -= 1
        if not self._waiting[who]:
            del self._waiting[who]
        if not self._waiting:  # nobody is kept from anything
            self._ends.clear()

    def note_answer(self, num_tokens: int) -> None:
        """An answer has ended with so many tokens."""
        self._mean_answer += _SMOOTHING * (num_tokens - self._mean_answer)


def _who(request: Request) -> tuple[int, str]:
    return request.priority, request.user


class QueueTime:
    """How long the queue is, by how fast it has moved: what each request has waited at its head.

    limit_s: who would wait longer is refused; 0: nobody.
    """

    def __init__(self, limit_s: float):
        self._limit_s = limit_s
        self._interval_s: float | None = None
        self._last_ns = 0  # the last admission

    @property
    def limit_ns(self) -> int:
        """0: none."""
        return int(self._limit_s * 1e9)

    def note_admission(self, queued_ns: int, now_ns: int) -> None:
        """Of a request that waits since queued_ns."""
        seconds = (now_ns - max(self._last_ns, queued_ns)) / 1e9
        before = seconds if self._interval_s is None else self._interval_s
        self._interval_s = before + _SMOOTHING * (seconds - before)
        self._last_ns = now_ns

    def estimate_s(self, num_ahead: int) -> float:
        """Of a request that has so many before it."""
        return num_ahead * (self._interval_s or 0.0)

    def check(self, waiting: list[Sequence], priority: int, turn: float) -> None:
        """Raises QueueFullError if a request of this priority and turn would wait too long."""
        if not self._limit_s or not waiting:
            return
        ahead = bisect(waiting, (priority, turn), key=lambda sequence: sequence.order[:2])
        seconds = self.estimate_s(ahead)
        if seconds > self._limit_s:
            raise self._refusal(seconds, seconds - self._limit_s)

    def late(self) -> QueueFullError:
        """What a request is told that has waited as long as it may."""
        return self._refusal(self._limit_s, self._limit_s)

    def _refusal(self, seconds: float, later: float) -> QueueFullError:
        return QueueFullError(
            f"the server is full: the queue takes {ceil(seconds)} s or more, and max_queue_s allows "
            f"{self._limit_s:g}; send the request again in {max(1, ceil(later))} s"
        )
