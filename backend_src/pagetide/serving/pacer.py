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

Key = tuple[int, int]  # request number, sample


class ResponsePacer:
    """put() never blocks; send(output) is called once for each chunk, in order within a sequence.

    max_share: share of the time that sending may take, 1: all of it.
    """

    def __init__(self, send: Callable[[Output], None], max_share: float = 1.0):
        self.max_share = max_share
        self._send = send
        self._pending: dict[Key, Output] = {}  # what has not been sent; oldest first
        self._urgent: dict[Key, None] = {}  # those of them that hold a first or last chunk
        self._begun: set[Key] = set()
        self._free_at = 0.0  # when the next chunk that is not urgent may go
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
                if output.finish_reason or key not in self._begun:
                    self._urgent[key] = None
                self._begun.add(key)
                if output.finish_reason:
                    self._begun.discard(key)
            self._changed.notify()

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
            end = time.monotonic()
            self._free_at = max(self._free_at, begin) + (end - begin) / self.max_share

    def _next(self) -> Output | None:
        """The next chunk to send, as soon as it may go; None when all is sent and the pacer is closed."""
        with self._changed:
            while True:
                wait = self._free_at - time.monotonic()
                if self._urgent or (self._pending and (wait <= 0 or not self._is_open)):
                    key = next(iter(self._urgent or self._pending))
                    self._urgent.pop(key, None)
                    return self._pending.pop(key)
                if not self._pending and not self._is_open:
                    return None
                self._changed.wait(wait if self._pending else None)


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
