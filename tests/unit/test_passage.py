"""llm knows how far postprocessing is, and never waits for ever."""

from __future__ import annotations

import time

import pytest
from pagetide.serving.pacer import ChunkQueue, ResponsePacer
from pagetide.serving.passage import Passage, Passed, passed_file
from pagetide.types import Output


@pytest.fixture
def file(tmp_path):
    return passed_file(tmp_path / "engine-1.sock")


def send_until_full(passage: Passage, now: float) -> list[int]:
    """The marks of the chunks that were free to go."""
    marks = []
    for _ in range(1000):
        if not passage.is_free(now):
            return [mark for mark in marks if mark]
        marks.append(passage.next_mark())
    raise AssertionError("nothing holds it back")


def test_what_has_not_passed_holds_back_what_follows(file):
    passage, passed = Passage(file), Passed(file)
    marks = send_until_full(passage, 0.0)
    assert 2 <= len(marks) <= 8 and not passage.is_free(0.01)
    passed.note(marks[0])
    assert passage.is_free(0.01)
    assert len(send_until_full(passage, 0.01)) == 1
    passed.note(marks[-1])
    assert len(send_until_full(passage, 0.01)) >= 2


def test_marks_that_never_come_are_not_waited_for(file):
    passage = Passage(file)
    marks = send_until_full(passage, 0.0)
    assert not passage.is_free(0.04)
    assert passage.is_free(0.06), "whatever became of them, the streams go on"
    assert len(send_until_full(passage, 0.06)) >= 2 and not passage.is_free(0.1)
    Passed(file).note(marks[-1])  # later than anybody thought
    assert not passage.is_free(0.1), "what was sent after it has not passed"


def test_the_time_begins_when_the_way_gets_full(file):
    passage = Passage(file)
    passage.is_free(0.0)
    send_until_full(passage, 100.0)
    assert not passage.is_free(100.01)


def test_a_model_that_is_loaded_again_has_numbers_of_its_own(file, monkeypatch):
    passed, first = Passed(file), Passage(file)
    passed.note(send_until_full(first, 0.0)[-1])
    first.close()
    assert not file.exists()
    passed.note(first.next_mark() or 1 << 32)  # nobody is there to read it
    monkeypatch.setattr("os.getpid", lambda: 77)
    again = Passage(file)
    marks = send_until_full(again, 0.0)
    passed.note(marks[-1])
    assert again.is_free(0.0) and first.next_mark() >> 32 != marks[0] >> 32


@pytest.mark.parametrize("shares_processor", [True, False])
def test_only_first_and_last_chunks_go_on_a_full_way(shares_processor):
    queue = ChunkQueue(shares_processor)
    queue.put([Output(1, 0, [5]), Output(2, 0, [5])], 0.0)
    assert [queue.take(0.0, is_free=False).number for _ in range(2)] == [1, 2], "they are first ones"
    queue.put([Output(1, 0, [6]), Output(2, 0, [6], finish_reason="stop"), Output(3, 0, [5])], 1.0)
    assert [queue.take(1.0, is_free=False).number for _ in range(2)] == [2, 3]
    assert queue.take(1.0, is_free=False) is None
    queue.put([Output(1, 0, [7])], 1.1)
    assert queue.take(2.0).ids == [6, 7], "and the others are joined meanwhile"


def test_the_pacer_keeps_few_chunks_on_the_way(file, monkeypatch):
    monkeypatch.setattr("pagetide.serving.passage._PATIENCE_S", 1e9)
    passage, passed = Passage(file), Passed(file)
    sent: list[Output] = []
    marks: list[int] = []

    def send(output: Output) -> None:
        sent.append(output)
        marks.append(passage.next_mark())

    def note_all() -> None:
        passed.note(max(marks))

    pacer = ResponsePacer(send, passage)
    streams = range(200)
    pacer.put([Output(i, 0, [5]) for i in streams])  # first ones never wait
    wait_until(lambda: len(marks) == 200)
    note_all()
    pacer.put([Output(i, 0, [6]) for i in streams])
    pacer.put([Output(i, 0, [7]) for i in streams])
    wait_until(lambda: len(marks) > 200)
    time.sleep(0.2)  # in which a pacer that does not mind the way has sent all
    assert len(sent) <= 232
    while len([output for output in sent if 7 in output.ids]) < 200:
        note_all()
        time.sleep(0.001)
    pacer.close()
    for i in streams:
        assert [token for output in sent if output.number == i for token in output.ids] == [5, 6, 7]


def wait_until(is_so) -> None:
    deadline = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.001)
