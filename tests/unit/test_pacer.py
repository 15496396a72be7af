"""Chunks are joined while the way is busy, in order, and first and last ones do not wait."""

from __future__ import annotations

import threading
from itertools import pairwise

import pytest
from pagetide.serving.pacer import ChunkQueue, ResponsePacer
from pagetide.types import Output


def test_chunks_of_a_sequence_are_joined_while_the_way_is_busy_and_stay_in_order():
    sent, gate = [], threading.Event()

    def send(output: Output) -> None:
        gate.wait(10)
        sent.append(output)

    pacer = ResponsePacer(send, None)
    for token in range(50):
        pacer.put([Output(1, 0, [token]), Output(1, 1, [100 + token])])
    pacer.put([Output(1, 0, [50], 3, "stop")])
    gate.set()
    pacer.close()
    first = [o for o in sent if o.index == 0]
    assert [t for o in first for t in o.ids] == list(range(51))
    assert [t for o in sent if o.index == 1 for t in o.ids] == list(range(100, 150))
    assert len(sent) <= 4 and first[-1].finish_reason == "stop" and first[-1].num_cut == 3


def simulate(
    num_streams: int, step_s: float, num_steps: int, send_s: float = 0.0003, shares: bool = True
) -> dict[int, list[tuple[float, int]]]:
    """A token for each stream in every step, sent by a queue with a clock of its own: (when, tokens) of
    each stream's chunks.
    """
    queue, now, free_at = ChunkQueue(shares_processor=shares), 0.0, 0.0
    chunks: dict[int, list[tuple[float, int]]] = {i: [] for i in range(num_streams)}
    for step in range(num_steps):
        reason = "length" if step == num_steps - 1 else ""
        queue.put([Output(i, 0, [step], 0, reason) for i in range(num_streams)], step * step_s)
        now = max(step * step_s, free_at)
        while now < (step + 1) * step_s or reason:
            output = queue.take(now)
            if output is None:
                if not len(queue) or queue.due >= (step + 1) * step_s:
                    break
                now = queue.due
                continue
            now += send_s
            queue.sent(send_s)
            chunks[output.number].append((now, len(output.ids)))
        free_at = now
    return chunks


def gaps(chunks: dict[int, list[tuple[float, int]]]) -> list[float]:
    return sorted(b[0] - a[0] for its in chunks.values() for a, b in pairwise(its))


@pytest.mark.parametrize(
    "num_streams, step_s, longest_s",
    [(1, 0.01, 0.02), (4, 0.016, 0.04), (8, 0.02, 0.05), (32, 0.04, 0.2), (256, 0.15, 0.5)],
)
def test_no_reader_waits_longer_than_promised_and_all_wait_alike(num_streams, step_s, longest_s):
    chunks = simulate(num_streams, step_s, 100)
    assert all(sum(count for _, count in its) == 100 for its in chunks.values())
    found = gaps(chunks)
    assert found[int(0.99 * len(found))] <= longest_s
    assert max(count for its in chunks.values() for _, count in its) <= longest_s / step_s + 1, (
        "never a burst"
    )
    by_stream = [max(b[0] - a[0] for a, b in pairwise(its)) for its in chunks.values()]
    assert max(by_stream) <= 1.5 * found[int(0.99 * len(found))]


def test_tokens_are_joined_no_more_than_their_cost_asks_for():
    assert len(simulate(1, 0.01, 100)[0]) == 100, "one stream says every token"
    assert len(simulate(2, 0.05, 100)[0]) == 100, "and so do two, where steps are long"
    cheap, dear = (len(simulate(8, 0.02, 100, send_s)[0]) for send_s in (0.00005, 0.0005))
    assert cheap > dear >= 45, "of eight streams every second step, at least"


def test_where_the_engine_has_a_processor_of_its_own_every_token_goes_at_once():
    assert all(
        [count for _, count in its] == [1] * 50 for its in simulate(32, 0.02, 50, shares=False).values()
    )


def test_first_and_last_chunks_do_not_wait_for_a_round():
    queue = ChunkQueue(shares_processor=True)
    for number in range(32):
        queue.put([Output(number, 0, [1])], 0.0)
    assert len([queue.take(0.0) for _ in range(32)]) == 32
    queue.put([Output(0, 0, [2])], 0.001)
    assert queue.take(0.001).ids == [2] and queue.due > 0.02, "the first round begins at once"
    queue.put([Output(1, 0, [2]), Output(40, 0, [9])], 0.002)
    queue.put([Output(2, 0, [3], 0, "length")], 0.003)
    assert [queue.take(0.003).number for _ in range(2)] == [40, 2] and queue.take(0.003) is None
    assert queue.take(queue.due).number == 1


def test_what_waits_goes_although_nothing_more_comes():
    queue = ChunkQueue(shares_processor=True)
    for step in range(3):
        queue.put([Output(number, 0, [step]) for number in range(8)], 0.01 * step)
        while queue.take(0.01 * step):
            pass
    assert len(queue) == 8 and queue.take(queue.due - 1e-6) is None
    assert sum(queue.take(queue.due) is not None for _ in range(8)) == 8 and not len(queue)


def test_one_large_response_does_not_hold_up_all_others():
    queue = ChunkQueue(shares_processor=True)
    queue.put([Output(1, 0, [1])], 0.0)
    queue.take(0.0)
    queue.sent(5.0)
    assert queue.interval() < 0.1


def test_gaps_are_those_between_chunks_of_one_sequence_as_they_went():
    queue = ChunkQueue()
    for now, outputs in [
        (0.0, [Output(1, 0, [1]), Output(1, 1, [1])]),
        (0.25, [Output(1, 0, [2])]),
        (1.0, [Output(1, 1, [2], 0, "stop")]),
    ]:
        queue.put(outputs, now)
        while queue.take(now):
            pass
    assert queue.take_gaps() == [0.25, 1.0] and queue.take_gaps() == []
    queue.put([Output(1, 0, [3], 0, "stop")], 1.5)
    queue.put([Output(2, 0, [1])], 1.5)
    while queue.take(1.5):
        pass
    queue.forget(2)  # has failed
    queue.put([Output(2, 0, [2], 0, "cancelled")], 2.0)
    queue.take(2.0)
    assert queue.take_gaps() == [1.25]
    queue.put([Output(3, 0, [1])], 2.0)
    queue.take(2.0)
    queue.forget_all()
    assert not queue._sent_at, "streams that are gone leave nothing behind"
