"""Sends responses on a thread of its own, and joins chunks of the same sequence while the way is busy.

Sending is a blocking round trip of about 0.1 ms. When responses come faster, streams degrade to fewer, larger chunks, and nobody waits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import msgspec

from pagetide.types import Output


class ResponsePacer:
    """put() never blocks; send(output) is called once for each chunk, in order within a sequence."""

    def __init__(self, send: Callable[[Output], None]):
        self._send = send
        self._pending: dict[tuple[int, int], Output] = {}  # (request number, sample) -> what has not been sent; oldest first
        self._changed = threading.Condition()
        self._is_open = True
        self._thread = threading.Thread(target=self._run, name="pagetide-pacer", daemon=True)
        self._thread.start()

    def put(self, outputs: list[Output]) -> None:
        with self._changed:
            for output in outputs:
                key = (output.number, output.index)
                earlier = self._pending.get(key)
                self._pending[key] = output if earlier is None else join(earlier, output)
            self._changed.notify()

    def close(self) -> None:
        """Sends what is left, then ends."""
        with self._changed:
            self._is_open = False
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while (output := self._next()) is not None:
            self._send(output)

    def _next(self) -> Output | None:
        with self._changed:
            while not self._pending and self._is_open:
                self._changed.wait()
            return self._pending.pop(next(iter(self._pending))) if self._pending else None


def join(earlier: Output, later: Output) -> Output:
    """Two chunks that follow each other as one."""
    return msgspec.structs.replace(later, ids=earlier.ids + later.ids)
