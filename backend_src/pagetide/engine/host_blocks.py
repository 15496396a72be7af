"""The second tier of the KV cache: blocks in the host's memory keep what the device's blocks lose, prefixes
and preempted sequences alike, until it is asked for again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable


class HostBlocks:
    """num_blocks blocks by the names of their content; the least recently used is reused first.

    Knows what must move in the step that is being planned. A device runs first all outs, then all ins, each
    kind at once: no block is the target of two, and none that is brought in is overwritten before.
    """

    def __init__(self, num_blocks: int):
        self.num_blocks = num_blocks
        self._blank = list(range(num_blocks - 1, -1, -1))
        self._block_of: OrderedDict[bytes, int] = OrderedDict()  # least recently used first
        self._moving: set[int] = set()  # sources and targets of the step that is being planned
        self._outs: list[tuple[int, int]] = []  # (device block, host block)
        self._ins: list[tuple[int, int]] = []  # (host block, device block)

    def __contains__(self, name: bytes) -> bool:
        return name in self._block_of

    @property
    def num_used(self) -> int:
        """Blocks that hold something."""
        return len(self._block_of)

    def keep(self, name: bytes, device_block: int) -> None:
        """A device block loses the content of this name: it is kept here, if some block may be reused."""
        if name in self._block_of:
            self._block_of.move_to_end(name)
            return
        block = self._take()
        if block is not None:
            self._block_of[name] = block
            self._moving.add(block)
            self._outs.append((device_block, block))

    def _take(self) -> int | None:
        if self._blank:
            return self._blank.pop()
        for name, block in self._block_of.items():
            if block not in self._moving:
                del self._block_of[name]
                return block
        return None

    def hold(self, names: Iterable[bytes]) -> None:
        """Content that will be brought in this step: it is not lost to what is kept before."""
        self._moving |= {self._block_of[name] for name in names}

    def bring(self, name: bytes, device_block: int) -> None:
        """Content that is held comes to a device block; it stays here too."""
        self._block_of.move_to_end(name)
        self._ins.append((self._block_of[name], device_block))

    def take_moves(self) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """The outs and ins of the step whose planning ends."""
        outs, ins = self._outs, self._ins
        self._outs, self._ins = [], []
        self._moving.clear()
        return outs, ins

    def check_integrity(self) -> None:
        """Raises AssertionError unless every block is blank or has one name."""
        used = list(self._block_of.values())
        assert sorted(used + self._blank) == list(range(self.num_blocks)), (used, self._blank)
