"""Who waits and who runs, in order, and which row of the device each of them has."""

from __future__ import annotations

from bisect import insort

from pagetide.engine.blocks import BlockManager
from pagetide.engine.sequence import Sequence, Status


class Queues:
    """waiting, running: sorted by order. Every running sequence has a row, of which there are max_rows."""

    def __init__(self, max_rows: int, blocks: BlockManager):
        self._max_rows = max_rows
        self._blocks = blocks
        self._rows = list(range(max_rows - 1, -1, -1))
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []

    @property
    def num_free_rows(self) -> int:
        return len(self._rows)

    def enqueue(self, sequence: Sequence) -> None:
        """Lets a sequence without row and blocks wait."""
        sequence.status = Status.WAITING
        insort(self.waiting, sequence, key=lambda s: s.order)

    def start(self, sequence: Sequence) -> None:
        """Gives a sequence that waits nowhere a row; the device does not know it there yet."""
        sequence.row = self._rows.pop()
        sequence.status = Status.RUNNING
        sequence.num_placed = None
        insort(self.running, sequence, key=lambda s: s.order)

    def preempt(self, sequence: Sequence) -> None:
        """Takes a running sequence's blocks and row away.

        It computes everything again later, as far as the cache has forgotten it.
        """
        self._release(sequence)
        sequence.num_computed = 0
        self.enqueue(sequence)

    def leave(self, sequence: Sequence) -> None:
        """Takes a sequence that has ended out of its queue; what it has computed stays findable."""
        if sequence.status is Status.RUNNING:
            self._blocks.publish(sequence)
            self._release(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        sequence.status = Status.FINISHED

    def replace(self, beams: list[Sequence], following: list[tuple[Sequence, Sequence]]) -> None:
        """Lets some of the beams' (beam, continuation) run on in their place."""
        # Blocks get their new owners before the old ones let go, whose rows the new ones need.
        for parent, child in following:
            self._blocks.fork(parent, child)
            child.num_computed = parent.num_computed
        for beam in beams:
            self.leave(beam)
        for _, child in following:
            if child.blocks and self._rows:
                self.start(child)
            else:  # its parent was preempted, or other beams that were have not left rows enough
                self._blocks.free(child)
                child.num_computed = 0
                self.enqueue(child)

    def _release(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._blocks.free(sequence)
        self._rows.append(sequence.row)
        sequence.row = -1

    def check_integrity(self) -> None:
        """Raises AssertionError unless rows, blocks and states agree."""
        rows = [sequence.row for sequence in self.running]
        assert sorted(rows + self._rows) == list(range(self._max_rows)), (rows, self._rows)
        assert all(s.status is Status.RUNNING for s in self.running)
        assert all(s.status is Status.WAITING and not s.blocks for s in self.waiting)
