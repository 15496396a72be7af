"""Owns the KV cache's blocks: who holds which, which can be found by their content, which are free.

A full block is named by the hash chain of all tokens up to its end, so equal beginnings share blocks. A
block without an owner stays findable until it is reused; the least recently freed is reused first
(PagedAttention, arXiv:2309.06180; vLLM's prefix caching).
"""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Iterable

import numpy as np

from pagetide.engine.host_blocks import HostBlocks
from pagetide.engine.sequence import Sequence

ON_HOST = -1  # in the place of a block: its content lies in the host's memory


def hash_block(parent: bytes, token_ids: list[int]) -> bytes:
    """The name of a block whose predecessor is called parent (16 bytes; blake2b, so that nobody can make
    two prompts collide).
    """
    return hashlib.blake2b(parent + np.asarray(token_ids, np.int32).tobytes(), digest_size=16).digest()


def _root(salt: str, adapter: str) -> bytes:
    """What comes before the first block: prompts with different salts or adapters have no block in common."""
    if not (salt or adapter):
        return b""
    key = hashlib.blake2b(adapter.encode(), digest_size=16).digest() if adapter else b""
    return hashlib.blake2b(salt.encode(), digest_size=16, person=b"salt", key=key).digest()


class BlockManager:
    """Reference counts, prefix cache and free list over num_blocks blocks of block_size tokens.

    Only this class touches them. host: keeps what the device's blocks lose.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        enable_prefix_caching: bool = True,
        host: HostBlocks | None = None,
    ):
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._caching = enable_prefix_caching
        self.host = host
        self._references = [0] * num_blocks
        self._name_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._blank = list(range(num_blocks - 1, -1, -1))  # free, without findable content
        self._cached: OrderedDict[int, None] = OrderedDict()  # free, findable, least recently freed first
        # Blocks that content is copied from or to in the step that is being planned.
        self._copying: set[int] = set()
        self._freed_too_early: list[int] = []  # those of them that nobody holds any more

    @property
    def num_free(self) -> int:
        """Blocks that can be handed out, those that can still be found by their content included."""
        return len(self._blank) + len(self._cached)

    @property
    def num_used(self) -> int:
        """Blocks that a sequence holds."""
        return self.num_blocks - self.num_free - len(self._freed_too_early)

    @property
    def num_cached(self) -> int:
        """Free blocks whose content can still be found."""
        return len(self._cached)

    def num_blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold so many tokens."""
        return -(-num_tokens // self.block_size)

    # -- growing, forking, freeing -------------------------------------------------------------------------

    def grow(self, sequence: Sequence, num_tokens: int) -> list[tuple[int, int]] | None:
        """Makes room for the sequence's first num_tokens tokens, of which those from num_computed on will
        be written.

        Returns the block copies (source, target) that must run before the write, or None, with nothing
        changed, if blocks are lacking.
        """
        num_blocks = len(sequence.blocks)
        num_new = max(-(-num_tokens // self.block_size) - num_blocks, 0)
        writes_at = sequence.num_computed // self.block_size
        if not num_new and writes_at == num_blocks - 1 and self._references[sequence.blocks[-1]] == 1:
            return []
        shared = [
            i for i in range(writes_at, len(sequence.blocks)) if self._references[sequence.blocks[i]] > 1
        ]
        if num_new + len(shared) > self.num_free:
            return None
        copies = [(sequence.blocks[i], self._replace_shared(sequence, i)) for i in shared]
        sequence.blocks.extend(self._take_free() for _ in range(num_new))
        return copies

    def _replace_shared(self, sequence: Sequence, index: int) -> int:
        """Copy-on-write: gives the sequence a block of its own in place of a shared one."""
        own = self._take_free()
        self._copying |= {own, sequence.blocks[index]}
        self._references[sequence.blocks[index]] -= 1
        sequence.blocks[index] = own
        return own

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Lets the child hold all of the parent's blocks too."""
        child.blocks = list(parent.blocks)
        child.hashes = list(parent.hashes)
        child.num_published = parent.num_published
        for block in child.blocks:
            self._references[block] += 1

    def free(self, sequence: Sequence) -> None:
        """Gives back all blocks of the sequence."""
        # Last to first, so that the tail of a chain is reused before its head.
        for block in reversed(sequence.blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                self._put_free(block)
        sequence.blocks = []
        sequence.num_published = 0

    def _take_free(self) -> int:
        if self._blank:
            block = self._blank.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            name = self._name_of[block]
            if self.host is not None and name is not None:
                self.host.keep(name, block)
            self._forget(block)
        self._references[block] = 1
        return block

    def end_planning(self) -> None:
        """The step's copies are known: their blocks may be used again, in the next step.

        Until then none of them is used for anything else, so that no block is the target of one copy and
        the source or target of another: a device may run all copies of a step at once.
        """
        self._copying.clear()
        freed, self._freed_too_early = self._freed_too_early, []
        for block in freed:
            self._put_free(block)

    def _put_free(self, block: int) -> None:
        if block in self._copying:
            self._freed_too_early.append(block)
            return
        if self._name_of[block] is None:
            self._blank.append(block)
        else:
            self._cached[block] = None

    def _forget(self, block: int) -> None:
        name = self._name_of[block]
        if name is not None:
            del self._block_of[name]
            self._name_of[block] = None

    # -- prefix cache --------------------------------------------------------------------------------------

    def match_prefix(self, sequence: Sequence) -> list[int]:
        """The cached blocks with which the sequence's tokens begin, ON_HOST for those that lie there.

        At least one token is left to compute.
        """
        if not self._caching:
            return []
        found = []
        for name in self._names(sequence, (len(sequence.token_ids) - 1) // self.block_size):
            block = self._block_of.get(name, ON_HOST)
            if block in self._freed_too_early:
                break
            if block == ON_HOST and (self.host is None or name not in self.host):
                break
            found.append(block)
        return found

    def num_free_for(self, found: Iterable[int]) -> int:
        """How many free blocks adopt() takes for these: those without an owner, and those to be filled."""
        return sum(block == ON_HOST or self._references[block] == 0 for block in found)

    def adopt(self, sequence: Sequence, found: list[int]) -> None:
        """Gives a sequence that has no blocks those that match_prefix found, as computed."""
        assert not sequence.blocks, sequence.blocks
        for block in found:
            if block == ON_HOST:
                continue
            if self._references[block] == 0:
                del self._cached[block]
            self._references[block] += 1
        sequence.blocks = list(found) if self.host is None else self._bring(sequence.hashes, found)
        sequence.num_computed = len(found) * self.block_size
        sequence.num_published = len(found)

    def _bring(self, names: list[bytes], found: list[int]) -> list[int]:
        """The blocks, with one of the device for each whose content comes from the host."""
        assert self.host is not None
        self.host.hold(name for name, block in zip(names, found, strict=False) if block == ON_HOST)
        blocks = list(found)
        for index, name in enumerate(names[: len(found)]):
            if blocks[index] == ON_HOST:
                blocks[index] = block = self._take_free()
                self.host.bring(name, block)
                self._block_of[name] = block
                self._name_of[block] = name
                self._copying.add(block)
        return blocks

    def publish(self, sequence: Sequence) -> None:
        """Makes the sequence's full blocks findable.

        They may still be on their way: whoever finds one reads it in a later step, or later in the same
        step, and the device keeps order.
        """
        if not self._caching:
            return
        num_full = min(sequence.num_computed, len(sequence.token_ids)) // self.block_size
        if num_full <= sequence.num_published:
            return
        names = self._names(sequence, num_full)
        for index in range(sequence.num_published, num_full):
            block, name = sequence.blocks[index], names[index]
            if name not in self._block_of:
                self._block_of[name] = block
                self._name_of[block] = name
        sequence.num_published = num_full

    def _names(self, sequence: Sequence, num_full: int) -> list[bytes]:
        """The names of the sequence's first num_full blocks, worked out as far as they are not known yet."""
        size = self.block_size
        while len(sequence.hashes) < num_full:
            at = len(sequence.hashes)
            parent = sequence.hashes[-1] if at else _root(sequence.request.salt, sequence.group.adapter_key)
            sequence.hashes.append(hash_block(parent, sequence.token_ids[at * size : (at + 1) * size]))
        return sequence.hashes[:num_full]

    # -- invariants ----------------------------------------------------------------------------------------

    def check_integrity(self, holders: Iterable[Sequence]) -> None:
        """Raises AssertionError unless every block is held, blank or cached exactly as the holders say."""
        assert not self._copying and not self._freed_too_early, (self._copying, self._freed_too_early)
        held = Counter(block for sequence in holders for block in sequence.blocks)
        blank, cached = set(self._blank), set(self._cached)
        assert len(blank) == len(self._blank), "a block is twice in the blank list"
        assert not blank & cached, blank & cached
        for block in range(self.num_blocks):
            assert self._references[block] == held[block], (block, self._references[block], held[block])
            assert (block in blank or block in cached) == (held[block] == 0), block
            assert (block in cached) <= (self._name_of[block] is not None), block
            assert not (block in blank and self._name_of[block] is not None), block
        assert {name: block for block, name in enumerate(self._name_of) if name is not None} == self._block_of
        if self.host is not None:
            self.host.check_integrity()
