"""Chunks are joined while the way is busy, in order, and first and last ones do not wait."""

from __future__ import annotations

import threading

import pytest
from pagetide.serving.pacer import ChunkQueue, ResponsePacer
from pagetide.types import Output


def test_chunks_of_a_sequence_are_joined_while_the_way_is_busy_and_stay_in_order():
    sent, gate = [], threading.Event()

    def send(output: Output) -> None:
        gate.wait(10)
        sent.append(output)

    pacer = ResponsePacer(send)
    for token in range(50):
        pacer.put([Output(1, 0, [token]), Output(1, 1, [100 + token])])
    pacer.put([Output(1, 0, [50], 3, "stop")])
    gate.set()
    pacer.close()
    first = [o for o in sent if o.index == 0]
    assert [t for o in first for t in o.ids] == list(range(51))
    assert [t for o in sent if o.index == 1 for t in o.ids] == list(range(100, 150))
    assert len(sent) <= 4 and first[-1].finish_reason == "stop" and first[-1].num_cut == 3


def test_sending_is_held_to_its_share_but_first_and_last_chunks_go_at_once():
    queue = ChunkQueue(max_share=0.001)  # a millisecond of sending, then a second of rest
    queue.put(Output(1, 0, [1]))
    assert queue.take(now=5.0).ids == [1]
    queue.sent(5.0, 5.001)
    queue.put(Output(1, 0, [2]))
    assert queue.take(now=5.5) is None and queue.free_at == pytest.approx(6.0)
    queue.put(Output(2, 0, [9]))
    queue.put(Output(1, 0, [3], 0, "length"))
    assert [queue.take(now=5.5).ids for _ in range(2)] == [[9], [2, 3]]
    assert queue.take(now=9.0) is None and not len(queue)


def test_a_chunk_goes_when_its_time_has_come_with_all_that_has_come_meanwhile():
    queue = ChunkQueue(max_share=0.5)
    queue.put(Output(1, 0, [1]))
    queue.take(now=0.0)
    queue.sent(0.0, 0.001)
    queue.put(Output(1, 0, [2]))
    assert queue.take(now=0.0019) is None and queue.free_at == pytest.approx(0.002)
    queue.put(Output(1, 0, [3]))
    assert queue.take(now=0.0021).ids == [2, 3]


def test_one_large_response_does_not_hold_up_all_others():
    queue = ChunkQueue(max_share=0.025)
    queue.put(Output(1, 0, [1]))
    queue.take(now=0.0)
    queue.sent(0.0, 0.5)
    assert queue.free_at < 0.7
