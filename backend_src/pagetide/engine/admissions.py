"""Whether a waiting sequence fits beside those that run, and beside what they will want soon."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from pagetide.config import Settings
from pagetide.engine.blocks import BlockManager
from pagetide.engine.sequence import Sequence


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
