"""Whether a waiting sequence fits beside those that run, and beside what they will want soon."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import NamedTuple

from pagetide.config import Settings
from pagetide.engine.adapters import Adapter, AdapterPlaces
from pagetide.engine.blocks import BlockManager
from pagetide.engine.sequence import Sequence, SequenceGroup


class Admittance(NamedTuple):
    """What a sequence starts with.

    found: blocks of its prompt that are cached, as BlockManager.match_prefix gives them. num_tokens: how
    many it runs in its first step.
    num_reserved: tokens that get blocks at once.
    """

    found: list[int]
    num_tokens: int
    num_reserved: int


def admittance(
    sequence: Sequence, blocks: BlockManager, settings: Settings, budget: int, num_running: int
) -> Admittance | None:
    """None if there are not blocks enough. budget: tokens that the step may still take."""
    # What the model thinks of the prompt's tokens is known only by running them.
    found = [] if sequence.group.reports_prompt else blocks.match_prefix(sequence)
    num_found = len(found) * blocks.block_size
    num_tokens = min(sequence.num_wanted - num_found, budget)
    is_paged = settings.kv_reservation == "paged"
    num_reserved = num_found + num_tokens if is_paged else sequence.max_len
    num_needed = blocks.num_blocks_for(num_reserved) - len(found) + blocks.num_free_for(found)
    # Each running sequence may want a block soon: without a reserve new ones would be preempted at once.
    if num_needed + num_running > blocks.num_free:
        return None
    return Admittance(found, num_tokens, num_reserved)


class Claims:
    """One look through those who wait, in their order: whose adapter finds no place claims the one that has
    been used least recently, which nobody behind him gets. running: sequences, whose places are used.
    """

    def __init__(self, places: AdapterPlaces, running: Iterable[Sequence]):
        self._places, self._running = places, running
        self._claimed: dict[str, int] = {}  # by the key of the adapter that waits

    @cached_property
    def _used(self) -> set[int]:
        return {sequence.group.adapter_place for sequence in self._running}

    def give(self, group: SequenceGroup) -> bool:
        """Gives a request's adapter a place, if it has one; False if it has to wait."""
        adapter = group.adapter
        if adapter is None or any(sequence.row >= 0 for sequence in group.unfinished):
            return True
        place = self._places.find(adapter, self._used, self._claimed.values())
        if place is None:
            self._claim(adapter)
            return False
        group.adapter_place = place
        self._used.add(place)
        return True

    def _claim(self, adapter: Adapter) -> None:
        if adapter.key in self._claimed or self._places.has_room(adapter, self._used):
            return  # it waits for a load of another, or behind who waits for its place
        place = self._places.next_free(self._claimed.values())
        if place is not None:
            self._claimed[adapter.key] = place


def num_rows_for(sequence: Sequence) -> int:
    """Rows that a waiting sequence must find: its own, its followers', those of beams that it will become."""
    group = sequence.group
    further_beams = group.params.beam_width - len(group.unfinished) if group.is_beam_search else 0
    return 1 + len(sequence.followers) + further_beams


def num_promised_rows(running: Iterable[Sequence]) -> int:
    """Rows that running sequences will want for their followers or further beams."""
    followers, searches = 0, set()
    for sequence in running:
        followers += len(sequence.followers)
        if sequence.group.is_beam_search:
            searches.add(sequence.group)
    return followers + sum(group.params.beam_width - len(group.unfinished) for group in searches)
