"""Says in the log what the engine is at when a step takes long, while it does: where the time of a pause that
clients saw has gone.
"""

from __future__ import annotations

import logging
import sys
import traceback

log = logging.getLogger("pagetide.engine")

LONG_S = 5.0
_MOST_FRAMES = 8


class Lookout:
    """thread: the identifier (threading.get_ident) of the one that computes."""

    def __init__(self, thread: int):
        self._thread = thread
        self._looked_at: float | None = None
        self._round, self._since = 0, 0.0
        self._is_told = False

    def look(self, number: int, now: float) -> None:
        """To be called about once a second. number: the round that the engine is at, 0 while it waits for
        requests; now: in seconds of the monotonic clock.
        """
        if self._looked_at is not None and now - self._looked_at > LONG_S:
            log.warning(
                "nothing ran here for %.1f s: the machine was paused or overloaded, or a library held the "
                "interpreter",
                now - self._looked_at,
            )
        self._looked_at = now
        if number != self._round:
            if self._is_told:
                log.warning("that step took %.1f s", now - self._since)
            self._round, self._since, self._is_told = number, now, False
        elif number and not self._is_told and now - self._since >= LONG_S:
            self._is_told = True
            log.warning("a step takes longer than %g s; the engine is at: %s", LONG_S, self._place())

    def _place(self) -> str:
        """Functions, from the outermost: `engine.py:98 step > ...`."""
        frame = sys._current_frames().get(self._thread)
        stack = traceback.extract_stack(frame, limit=None)[-_MOST_FRAMES:] if frame is not None else []
        return " > ".join(f"{one.filename.rpartition('/')[2]}:{one.lineno} {one.name}" for one in stack)
