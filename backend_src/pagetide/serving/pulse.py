"""Whether an engine's process still does something: what it says of itself, once a second, and what it means
when it says nothing.
"""

from __future__ import annotations


class Pulse:
    """Judges one engine process after the other; knows no clock, but is asked once a second.

    limit_s: how long a step may take, and how long the process may say nothing; 0: for ever. Seconds are
    counted by being asked, so that a machine that was stopped as a whole does not count as a stuck engine.
    """

    def __init__(self, limit_s: float):
        self._limit_s = limit_s
        self.start()

    def start(self) -> None:
        """A new process, of which nothing is expected until it has spoken."""
        self._has_spoken = False
        self._silent_s = 0
        self._busy_s = 0.0

    def beat(self, busy_s: float) -> None:
        """The process says for how long it has been at its present step; 0: at none."""
        self._has_spoken, self._silent_s, self._busy_s = True, 0, busy_s

    def tick(self) -> str:
        """A second later: why the process should end, empty if it should not."""
        if not self._limit_s or not self._has_spoken:
            return ""
        self._silent_s += 1
        if self._busy_s > self._limit_s:
            return f"a step took longer than {self._limit_s:g} s (the setting step_timeout_s)"
        if self._silent_s > self._limit_s:
            return f"it gave no sign of life for {self._limit_s:g} s (the setting step_timeout_s)"
        return ""
