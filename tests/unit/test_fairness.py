"""A server that is asked for more than it can do: users take turns; who would wait too long is told so."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pagetide.engine.fairness import Turns
from pagetide.types import QueueFullError, Request, SamplingParams
from small_engine import SmallEngine

S = 10**9


def finished(small: SmallEngine) -> list[int]:
    return [output.number for output in small.outputs if output.finish_reason]


def test_a_user_with_few_requests_does_not_wait_for_one_with_many():
    small = SmallEngine(max_num_seqs=1)
    for number in range(10):
        small.add(number, [1, 2, 3, 4], max_tokens=2, user="many")
    small.step()
    for number in (100, 101):
        small.add(number, [1, 2, 3, 4], max_tokens=2, user="few")
    small.run()
    order = finished(small)
    assert max(order.index(100), order.index(101)) < 6
    assert [number for number in order if number < 100] == list(range(10))


def test_priority_goes_before_turns():
    small = SmallEngine(max_num_seqs=1)
    for number in range(5):
        small.add(number, [1, 2], max_tokens=2, user="a", priority=-1)
    small.add(9, [1, 2], max_tokens=2, user="b")
    small.run()
    assert finished(small)[-1] == 9


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(1, 60), st.integers(1, 40)), min_size=60, max_size=90
    )
)
def test_users_that_always_wait_get_the_same(arrivals):
    """Of tokens, up to two requests' more or less."""
    turns, waiting = Turns(), []
    for number, (user, prompt, answer) in enumerate(arrivals):
        request = Request(
            number=number, prompt_ids=[1] * prompt, params=SamplingParams(max_tokens=answer), user=user
        )
        waiting.append((turns.take(request)[0], number, request))
    served: Counter[str] = Counter()
    left = Counter(user for user, _, _ in arrivals)
    for _, _, request in sorted(waiting, key=lambda one: one[:2]):
        if min(left["a"], left["b"], left["c"]) == 0:
            break
        turns.note_start(request, len(request.prompt_ids) + request.params.max_tokens)
        served[request.user] += len(request.prompt_ids) + request.params.max_tokens
        left[request.user] -= 1
        assert max(served[u] for u in "abc") - min(served[u] for u in "abc") <= 2 * 100


def request_of(number: int, user: str) -> Request:
    return Request(number=number, prompt_ids=[1] * 10, params=SamplingParams(max_tokens=10), user=user)


def test_users_who_come_once_cannot_keep_a_regular_one_waiting():
    turns, waiting, cost = Turns(), [], 0
    for number in range(5):
        turn, cost = turns.take(request_of(number, "regular"))
        waiting.append((turn, number, "regular"))
    for number in range(5, 200):
        turn, _ = turns.take(request_of(number, f"once{number}"))
        waiting.append((turn, number, f"once{number}"))
        first = min(waiting)
        waiting.remove(first)
        turns.note_start(request_of(first[1], first[2]), cost)
        if not any(user == "regular" for _, _, user in waiting):
            return
    raise AssertionError(waiting[:5])


def test_who_takes_back_what_waits_owes_nothing():
    small = SmallEngine(max_num_seqs=1)
    small.add(0, [1, 2, 3, 4], max_tokens=8)
    for number in range(1, 4):
        small.add(number, [1, 2, 3, 4], max_tokens=2, user="other")
    for number in range(100, 130):
        small.add(number, [1, 2, 3, 4], max_tokens=2, user="hasty")
    small.step()
    small.engine.cancel(list(range(100, 130)))
    small.add(200, [1, 2, 3, 4], max_tokens=2, user="hasty")
    small.run()
    order = [number for number in finished(small) if number < 100 or number == 200]
    assert order.index(200) < 3


def test_the_estimate_follows_when_the_queue_moves_faster_again():
    small = full_engine(10.0)
    small.run()
    small.clock_ns += 1000 * S  # nobody waits: no time of a queue
    for number in range(60, 62):
        small.add(number, [1, 2], max_tokens=1)
    small.clock_ns += 9 * S
    small.step()
    for number in range(100, 400):  # one waits at a time, and is served at once
        small.add(number, [1, 2], max_tokens=1)
        small.run()
    assert small.scheduler.queue_time.estimate_s(1) < 0.1 and small.refusals == []


def full_engine(max_queue_s: float) -> SmallEngine:
    """One sequence runs, and one ends each second."""
    small = SmallEngine(max_num_seqs=1, max_queue_s=max_queue_s)
    for number in range(6):
        small.add(number, [1, 2], max_tokens=1)
    for _ in range(100):
        if len(finished(small)) == 3:
            return small
        small.clock_ns += S // 2
        small.step()
    raise AssertionError(finished(small))


def test_who_would_wait_too_long_is_told_when_to_come_back():
    small = full_engine(10.0)
    added = 0
    with pytest.raises(QueueFullError, match=r"max_queue_s allows 10; send the request again in \d+ s"):
        for added in range(100, 200):
            small.add(added, [1, 2], max_tokens=1)
    seconds = small.scheduler.queue_time.estimate_s(small.scheduler.num_waiting)
    assert 10 < seconds < 12.5 and added > 100
    small.add(999, [1, 2], max_tokens=1, priority=-1)  # has nobody before it
    small.run()
    assert 999 in finished(small) and small.refusals == []


def test_who_has_waited_too_long_is_told_too():
    small = full_engine(10.0)
    small.add(100, [1, 2], max_tokens=1, priority=1)
    small.clock_ns += 11 * S
    small.run()
    assert [refusal.number for refusal in small.refusals] == [3, 4, 5, 100]
    assert all(isinstance(refusal.error, QueueFullError) for refusal in small.refusals)


def test_nobody_is_refused_without_a_limit_or_a_queue():
    small = full_engine(0.0)
    for number in range(100, 200):
        small.add(number, [1, 2], max_tokens=1)
    small.clock_ns += 1000 * S
    small.run()
    assert len(finished(small)) == 106
    small = full_engine(30.0)
    small.run()
    small.add(100, [1, 2], max_tokens=1)
    small.run()
    assert 100 in finished(small)
