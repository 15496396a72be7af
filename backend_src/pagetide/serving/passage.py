"""How far `postprocessing` is with what `llm` has sent.

Sending to Triton never waits for who comes next: chunks that are sent faster than postprocessing takes them
queue up inside Triton, where they cannot be joined and nothing overtakes them, a first token neither. So
every few chunks carry their number, postprocessing notes it in a few bytes of shared memory, and what is too
far ahead of that waits where it can still be joined.
"""

from __future__ import annotations

import mmap
import os
import struct
from pathlib import Path

_MARK_EVERY = 8  # chunks: a mark costs a tensor
_MOST_AHEAD = 32  # chunks, about 10 ms of postprocessing
_PATIENCE_S = 0.05  # after which what has not been noted is taken to be lost
_NUMBER = struct.Struct("=Q")


def passed_file(socket: Path) -> Path:
    """Where the clients of the engine at this socket have the number."""
    return socket.with_suffix(".passed")


class Passage:
    """The side of `llm`, which makes the file; times are seconds that the caller gives."""

    def __init__(self, file: Path):
        self._file = file
        file.unlink(missing_ok=True)  # of an earlier process of this model
        self._sent = os.getpid() << 32  # so that postprocessing can tell whose numbers these are
        with file.open("x+b") as opened:
            opened.write(_NUMBER.pack(self._sent))
            opened.flush()
            self._memory = mmap.mmap(opened.fileno(), _NUMBER.size)
        self._noted = self._passed = self._sent
        self._since = 0.0  # when a number was noted, or the way became full

    def next_mark(self) -> int:
        """Counts a chunk that goes now; its number if it is to carry it, otherwise 0."""
        self._sent += 1
        return self._sent if self._sent % _MARK_EVERY == 0 else 0

    def is_free(self, now: float) -> bool:
        """Whether another chunk may go."""
        (noted,) = _NUMBER.unpack_from(self._memory)
        if noted != self._noted:
            self._noted = self._passed = noted
            self._since = now
        if self._sent - self._passed < _MOST_AHEAD:
            self._since = now
        elif now - self._since > _PATIENCE_S:
            self._passed = self._sent
        return self._sent - self._passed < _MOST_AHEAD

    def close(self) -> None:
        self._file.unlink(missing_ok=True)


class Passed:
    """The side of `postprocessing`."""

    def __init__(self, file: Path):
        self._file = file
        self._owner = 0
        self._memory: mmap.mmap | None = None

    def note(self, number: int) -> None:
        """This chunk has come."""
        if number >> 32 != self._owner:
            self._owner, self._memory = number >> 32, self._open()
        if self._memory is not None:
            _NUMBER.pack_into(self._memory, 0, number)

    def _open(self) -> mmap.mmap | None:
        try:
            with self._file.open("r+b") as opened:
                return mmap.mmap(opened.fileno(), _NUMBER.size)
        except (OSError, ValueError):  # whose numbers these are has ended meanwhile, or just begins
            return None
