"""When an engine's process counts as stuck, second by second."""

from __future__ import annotations

import pytest
from pagetide.serving.pulse import Pulse


def ticks(pulse: Pulse, count: int) -> list[str]:
    return [pulse.tick() for _ in range(count)]


def test_an_engine_that_goes_from_step_to_step_is_well_for_ever():
    pulse = Pulse(3, 600)
    for number in range(1, 100):
        pulse.beat(number)
        assert not pulse.tick()


def test_an_engine_without_work_is_well_for_ever():
    pulse = Pulse(3, 600)
    for _ in range(100):
        pulse.beat(0)
        assert not pulse.tick()


def test_loading_has_a_limit_of_its_own():
    pulse = Pulse(3, 600)
    assert not any(ticks(pulse, 600))
    assert pulse.tick() == "it was not ready within 600 s"


def test_silence_is_counted_from_the_last_beat():
    pulse = Pulse(5, 600)
    pulse.beat(0)
    assert not any(ticks(pulse, 5))
    assert pulse.tick() == "it gave no sign of life for 6 s (the setting step_timeout_s)"
    pulse.beat(0)
    assert not pulse.tick()


def test_a_step_that_is_too_long_is_told():
    pulse = Pulse(3, 600)
    said = []
    for _ in range(4):
        pulse.beat(7)
        said.append(pulse.tick())
    assert said == ["", "", "", "a step took longer than 3 s (the setting step_timeout_s)"]


def test_a_pause_of_the_whole_machine_is_no_fault():
    """However long it was: nobody has asked meanwhile, and the step goes on."""
    pulse = Pulse(3, 600)
    for number in (7, 7, 8, 8, 9):
        pulse.beat(number)
        assert not pulse.tick()


@pytest.mark.parametrize("limit", [0.1, 1])
def test_a_short_limit_does_not_mean_beats_that_are_late(limit):
    pulse = Pulse(limit, 600)
    pulse.beat(0)
    assert not any(ticks(pulse, 3))


def test_the_next_process_begins_anew():
    pulse = Pulse(3, 600)
    pulse.beat(9)
    assert any(ticks(pulse, 9))
    pulse.start()
    assert not any(ticks(pulse, 100))


@pytest.mark.parametrize("number", [0, 5])
def test_without_a_limit_nothing_is_too_long(number):
    pulse = Pulse(0, 600)
    pulse.beat(number)
    assert not any(ticks(pulse, 1000))
