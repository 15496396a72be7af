"""What the engine's log says of a step that takes long."""

from __future__ import annotations

import logging
import threading

import pytest
from pagetide.engine.lookout import LONG_S, Lookout


@pytest.fixture
def computing():
    """The identifier of a thread that is in wait_for_memory()."""
    ends = threading.Event()
    inside = threading.Event()

    def wait_for_memory():
        inside.set()
        ends.wait()

    thread = threading.Thread(target=wait_for_memory)
    thread.start()
    inside.wait()
    yield thread.ident
    ends.set()
    thread.join()


def said(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_a_long_step_is_told_once_with_its_place_and_then_its_length(computing, caplog):
    caplog.set_level(logging.WARNING)
    lookout = Lookout(computing)
    for second in range(9):
        lookout.look(7, 100.0 + second)
    (told,) = said(caplog)
    assert told.startswith(f"a step takes longer than {LONG_S:g} s") and "wait_for_memory" in told
    lookout.look(8, 109.0)
    assert said(caplog)[1:] == ["that step took 9.0 s"]
    for second in range(4):
        lookout.look(9 + second, 110.0 + second)
    assert len(said(caplog)) == 2


def test_waiting_for_requests_is_no_step(computing, caplog):
    caplog.set_level(logging.WARNING)
    lookout = Lookout(computing)
    for second in range(60):
        lookout.look(0, 100.0 + second)
    assert said(caplog) == []


def test_a_pause_of_everything_is_told_as_one(computing, caplog):
    caplog.set_level(logging.WARNING)
    lookout = Lookout(computing)
    lookout.look(7, 100.0)
    lookout.look(8, 120.5)
    (told,) = said(caplog)
    assert told.startswith("nothing ran here for 20.5 s")


def test_a_thread_that_has_gone_is_nowhere(caplog):
    lookout = Lookout(0)
    for second in range(9):
        lookout.look(7, 100.0 + second)
    assert said(caplog)[-1].endswith("the engine is at: ")
