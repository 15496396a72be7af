"""Sends responses on a thread of its own, and joins chunks of the same sequence where each token by itself
would cost too much.

Sending is a blocking round trip of about 0.2 ms. Where the model runs on a processor of its own, every
token goes as soon as the way is free. Where it shares Triton's cores, each response takes time from the
engine: there all streams are sent together, in rounds whose interval is as long as their cost asks for, and
no longer than a reader should wait. A sequence's first and last chunk never wait for a round.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

import msgspec

from pagetide.serving.passage import Passage
from pagetide.types import Output

Key = tuple[int, int]  # request number, sample

# A chunk's way through stub, core, postprocessing and front end takes this many times what its sender sees
# of it.
_COST_FACTOR = 4.0
_SHARE = 0.15  # of one core that sending may take, as far as the limits below allow
_MAX_CHARGE_S = (
    0.002  # what takes longer is one large response's own: others must not wait for it many times as long
)
_FEW, _MANY, _VERY_MANY = 8, 32, 256  # streams
_STEPS_OF_FEW = 1.5  # up to _FEW streams wait so many steps, which makes it every second one
_GAP_OF_MANY_S, _GAP_OF_VERY_MANY_S = 0.15, 0.4
_SMOOTHING = 0.1  # weight of the newest observation
_LOOK_S = 0.001  # between two looks whether a full way is free
_MAX_GAPS = 20_000  # nobody may be there to take them


class ChunkQueue:
    """What has not been sent, and what of it may go when.

    Knows no clock and no thread: times are seconds that the caller gives.

    shares_processor: each response takes time from the engine.
    """

    def __init__(self, shares_processor: bool = False):
        self.shares_processor = shares_processor
        self._pending: dict[Key, Output] = {}  # oldest first
        self._urgent: dict[Key, None] = {}  # those of them that hold a first or last chunk
        self._round: dict[Key, None] = {}  # those of them that go in this round
        self._begun: set[Key] = set()  # streams
        self._sent_at: dict[Key, float] = {}  # when the last chunk of each stream went
        self._gaps: deque[float] = deque(maxlen=_MAX_GAPS)
        self._cost_s = 0.0002
        self._step_s = 0.02
        self._put_at: float | None = None
        self._is_ripe = False  # the last step has ended near to when the next round should begin
        self._due = 0.0  # when the next round should begin

    def __len__(self) -> int:
        return len(self._pending)

    def put(self, outputs: list[Output], now: float) -> bool:
        """What a step has brought; True if something may go at once."""
        if self._put_at is not None and now - self._put_at < 1:
            self._step_s += _SMOOTHING * (now - self._put_at - self._step_s)
        self._put_at = now
        self._is_ripe |= now >= self._due - self._step_s / 2
        for output in outputs:
            self._put(output)
        return self._is_ripe or bool(self._urgent)

    def _put(self, output: Output) -> None:
        key = (output.number, output.index)
        earlier = self._pending.get(key)
        self._pending[key] = output if earlier is None else join(earlier, output)
        if output.finish_reason or key not in self._begun:
            self._urgent[key] = None
        self._begun.add(key)
        if output.finish_reason:
            self._begun.discard(key)

    def take(self, now: float, waits: bool = True, is_free: bool = True) -> Output | None:
        """The chunk that may go now, None if there is none. waits: others than urgent ones go in rounds;
        is_free: whether they may go at all.
        """
        if not self._pending or not (is_free or self._urgent):
            return None
        if not self._urgent and not self._round:
            if waits and not self._is_ripe and now < self.due:
                return None
            self._round = dict.fromkeys(self._pending)
            self._is_ripe = False
            self._due = now + self.interval()
        key = next(iter(self._urgent or self._round))
        self._urgent.pop(key, None)
        self._round.pop(key, None)
        output = self._pending.pop(key)
        self._note_gap(key, now, is_last=bool(output.finish_reason))
        return output

    def _note_gap(self, key: Key, now: float, is_last: bool) -> None:
        before = self._sent_at.pop(key, None)
        if before is not None:
            self._gaps.append(now - before)
        if not is_last:
            self._sent_at[key] = now

    def take_gaps(self) -> list[float]:
        """Seconds between the chunks of each sequence, of all chunks that went since the last call."""
        gaps = list(self._gaps)
        self._gaps.clear()
        return gaps

    @property
    def due(self) -> float:
        """When the next round begins even if no step ends before."""
        return self._due + self._step_s / 2

    def interval(self) -> float:
        """Seconds from one round to the next."""
        if not self.shares_processor:
            return 0.0
        count = len(self._begun)
        return min(count * self._cost_s * _COST_FACTOR / _SHARE, self._longest(count))

    def _longest(self, count: int) -> float:
        """So long a reader may wait: some steps where there are few streams, and a time that grows with
        their number.
        """
        few = _STEPS_OF_FEW * self._step_s
        if count <= _FEW:
            return few
        if count <= _MANY:
            return few + max(0.0, _GAP_OF_MANY_S - few) * (count - _FEW) / (_MANY - _FEW)
        return _GAP_OF_MANY_S + (_GAP_OF_VERY_MANY_S - _GAP_OF_MANY_S) * min(
            1.0, (count - _MANY) / (_VERY_MANY - _MANY)
        )

    def sent(self, seconds: float) -> None:
        """A chunk has been sent, which has taken so long."""
        self._cost_s += _SMOOTHING * (min(seconds, _MAX_CHARGE_S) - self._cost_s)

    def forget(self, number: int) -> None:
        """Nothing more comes of this request."""
        self._begun -= {key for key in self._begun if key[0] == number}
        for key in [key for key in self._sent_at if key[0] == number]:
            del self._sent_at[key]

    def forget_all(self) -> None:
        """After an engine's death: no sequence has begun."""
        self._begun.clear()
        self._sent_at.clear()


class ResponsePacer:
    """put() never blocks; send(output) is called once for each chunk, in order within a sequence.

    passage: says whether the way is free; none: it always is.
    """

    def __init__(self, send: Callable[[Output], None], passage: Passage | None):
        self._send, self._passage = send, passage
        self._queue = ChunkQueue()
        self._changed = threading.Condition()
        self._is_open = True
        self._thread = threading.Thread(target=self._run, name="pagetide-pacer", daemon=True)
        self._thread.start()

    def spare_the_processor(self) -> None:
        """From now on sending is done in rounds: the engine needs the same cores."""
        self._queue.shares_processor = True

    def put(self, outputs: list[Output]) -> None:
        """Queues a step's outputs; returns at once."""
        with self._changed:
            if self._queue.put(outputs, time.monotonic()):
                self._changed.notify()

    def take_gaps(self) -> list[float]:
        """As ChunkQueue's."""
        with self._changed:
            return self._queue.take_gaps()

    def forget(self, number: int) -> None:
        """Nothing more comes of this request."""
        with self._changed:
            self._queue.forget(number)

    def forget_all(self) -> None:
        """Nothing more comes of any request."""
        with self._changed:
            self._queue.forget_all()

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
            self._queue.sent(time.monotonic() - begin)

    def _next(self) -> Output | None:
        """The next chunk to send, as soon as it may go; None when all is sent and the pacer is closed."""
        with self._changed:
            while True:
                now = time.monotonic()
                is_free = self._passage is None or self._passage.is_free(now)
                if (output := self._queue.take(now, self._is_open, is_free)) is not None:
                    return output
                if not len(self._queue) and not self._is_open:
                    return None
                if len(self._queue) and not is_free:
                    self._changed.wait(_LOOK_S)
                else:
                    # Before the next round is due, put() need not wake anybody.
                    self._changed.wait(self._queue.due - now if self._queue.due > now else None)


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
