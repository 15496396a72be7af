"""Whether an engine's process still does something: what it says of itself, once a second, and what it means
when it says nothing.
"""

from __future__ import annotations

_SHORTEST_SILENCE_S = 3  # beats come once a second, but not on a second


class Pulse:
    """Judges one engine process after the other; knows no clock, but is asked once a second: a machine, or a
    container, that was stopped as a whole does not count as a stuck engine.

    step_s: how long a step may take, and how long the process may say nothing; 0: for ever. load_s: how long
    it may load.
    """

    def __init__(self, step_s: float, load_s: float):
        self._step_s, self._load_s = step_s, load_s
        self.start()

    def start(self) -> None:
        """A new process."""
        self._has_spoken = False
        self._silent_s = self._busy_s = self._round = 0

    def beat(self, number: int) -> None:
        """The process says the number of the step that it is at; 0: at none."""
        if number == 0 or number != self._round:
            self._busy_s = 0
        self._has_spoken, self._silent_s, self._round = True, 0, number

    def tick(self) -> str:
        """A second later: why the process should end, empty if it should not."""
        self._silent_s += 1
        if not self._has_spoken:
            is_late = self._silent_s > self._load_s
            return f"it was not ready within {self._load_s:g} s" if is_late else ""
        self._busy_s += self._round > 0
        if not self._step_s:
            return ""
        if self._busy_s > self._step_s:
            return f"a step took longer than {self._step_s:g} s (the setting step_timeout_s)"
        if self._silent_s > max(self._step_s, _SHORTEST_SILENCE_S):
            return f"it gave no sign of life for {self._silent_s} s (the setting step_timeout_s)"
        return ""
