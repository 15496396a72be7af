"""When an engine's process counts as stuck, second by second."""

from __future__ import annotations

import pytest
from pagetide.serving.pulse import Pulse


def ticks(pulse: Pulse, count: int) -> list[str]:
    return [pulse.tick() for _ in range(count)]


def test_an_engine_that_beats_is_well_for_ever():
    pulse = Pulse(3)
    for _ in range(100):
        pulse.beat(2.9)
        assert not pulse.tick()


def test_loading_takes_as_long_as_it_takes():
    assert not any(ticks(Pulse(3), 1000))


def test_silence_is_counted_from_the_last_beat():
    pulse = Pulse(3)
    pulse.beat(0)
    assert not any(ticks(pulse, 3))
    assert pulse.tick() == "it gave no sign of life for 3 s (the setting step_timeout_s)"
    pulse.beat(0)
    assert not pulse.tick()


def test_a_step_that_is_too_long_is_told():
    pulse = Pulse(1.5)
    pulse.beat(1.6)
    assert pulse.tick() == "a step took longer than 1.5 s (the setting step_timeout_s)"


def test_the_next_process_begins_anew():
    pulse = Pulse(3)
    pulse.beat(9)
    assert pulse.tick()
    pulse.start()
    assert not any(ticks(pulse, 100))


@pytest.mark.parametrize("busy", [0, 1e6])
def test_without_a_limit_nothing_is_too_long(busy):
    pulse = Pulse(0)
    pulse.beat(busy)
    assert not any(ticks(pulse, 1000))
