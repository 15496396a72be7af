"""Sends responses on a thread of its own, and joins chunks of the same sequence while the way is busy.

Sending is a blocking round trip of about 0.1 ms. When responses come faster, streams degrade to fewer, larger chunks, and nobody waits.
Where the model runs on the same processor as Triton, each response also takes time from the engine: there sending is held to a share of the time.
A sequence's first and last chunk never wait for that.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import msgspec

from pagetide.types import Output

_MAX_CHARGE_S = 0.002
Key = tuple[int, int]  # request number, sample


class ChunkQueue:
    """What has not been sent, and what of it may go when. Knows no clock and no thread: times are seconds that the caller gives.

    max_share: share of the time that sending may take, 1: all of it.
    """

    def __init__(self, max_share: float = 1.0):
        self.max_share = max_share
        self._pending: dict[Key, Output] = {}  # oldest first
        self._urgent: dict[Key, None] = {}  # those of them that hold a first or last chunk
        self._begun: set[Key] = set()
        self._free_at = 0.0  # when the next chunk that is not urgent may go

    def __len__(self) -> int:
        return len(self._pending)

    def put(self, output: Output) -> None:
        key = (output.number, output.index)
        earlier = self._pending.get(key)
        self._pending[key] = output if earlier is None else join(earlier, output)
        if output.finish_reason or key not in self._begun:
            self._urgent[key] = None
        self._begun.add(key)
        if output.finish_reason:
            self._begun.discard(key)

    def take(self, now: float, waits: bool = True) -> Output | None:
        """The chunk that may go now, None if there is none. waits: only urgent ones go before free_at()."""
        if not self._pending or (waits and not self._urgent and now < self._free_at):
            return None
        key = next(iter(self._urgent or self._pending))
        self._urgent.pop(key, None)
        return self._pending.pop(key)

    def sent(self, begin: float, end: float) -> None:
        """A chunk has been sent from begin to end."""
        # What takes longer is one response's own: the others must not wait for it forty times as long.
        self._free_at = max(self._free_at, begin) + min(end - begin, _MAX_CHARGE_S) / self.max_share

    def forget(self, number: int) -> None:
        """Nothing more comes of this request."""
        self._begun -= {key for key in self._begun if key[0] == number}

    @property
    def free_at(self) -> float:
        """When the next chunk that is not urgent may go."""
        return self._free_at


class ResponsePacer:
    """put() never blocks; send(output) is called once for each chunk, in order within a sequence."""

    def __init__(self, send: Callable[[Output], None]):
        self._send = send
        self._queue = ChunkQueue()
        self._changed = threading.Condition()
        self._is_open = True
        self._thread = threading.Thread(target=self._run, name="pagetide-pacer", daemon=True)
        self._thread.start()

    def hold_to(self, max_share: float) -> None:
        """From now on sending takes at most this share of the time."""
        self._queue.max_share = max_share

    def put(self, outputs: list[Output]) -> None:
        with self._changed:
            for output in outputs:
                self._queue.put(output)
            self._changed.notify()

    def forget(self, number: int) -> None:
        """Nothing more comes of this request."""
        with self._changed:
            self._queue.forget(number)

    def close(self) -> None:
        """Sends what is left, then ends."""
        with self._changed:
            self._is_open = False
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while (output := self._next()) is not None:
            begin = time.monotonic()
            self._send(output)
            self._queue.sent(begin, time.monotonic())

    def _next(self) -> Output | None:
        """The next chunk to send, as soon as it may go; None when all is sent and the pacer is closed."""
        with self._changed:
            while True:
                now = time.monotonic()
                if (output := self._queue.take(now, waits=self._is_open)) is not None:
                    return output
                if not len(self._queue) and not self._is_open:
                    return None
                self._changed.wait(self._queue.free_at - now if len(self._queue) else None)


def join(earlier: Output, later: Output) -> Output:
    """Two chunks that follow each other as one."""
    return msgspec.structs.replace(
        later,
        ids=earlier.ids + later.ids,
        scores=earlier.scores + later.scores,
        prompt_scores=earlier.prompt_scores + later.prompt_scores,
        context_logits=earlier.context_logits + later.context_logits,
        generation_logits=earlier.generation_logits + later.generation_logits,
    )
