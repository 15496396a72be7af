"""KV blocks that the host's memory keeps: what comes back from there, and what moves in one step.

Under random workloads: test_scheduler.py.
"""

from __future__ import annotations

from context_runner import expected_tokens
from pagetide.engine.blocks import ON_HOST
from pagetide.engine.host_blocks import HostBlocks
from small_engine import SmallEngine


def test_a_preempted_sequence_comes_back_from_the_hosts_memory():
    """Nothing but what did not fill a block is computed twice."""
    computed = {}
    for num_host_blocks in (0, 60):
        small = SmallEngine(num_blocks=20, num_host_blocks=num_host_blocks, max_num_batched_tokens=64)
        for number in range(4):
            small.add(number, list(range(number, number + 20)), max_tokens=30)
        small.run()
        counters = small.scheduler.counters
        assert counters.preemptions > 0
        for number in range(4):
            prompt = list(range(number, number + 20))
            assert small.tokens(number) == expected_tokens(prompt, 30, 0)
        computed[num_host_blocks] = small.runner.num_computed_tokens
        assert (counters.swapped_in > 0) == (counters.swapped_out > 0) == (num_host_blocks > 0)
    at_least_once = 4 * (20 + 29)
    assert computed[60] <= at_least_once + counters.preemptions * small.blocks.block_size < computed[0]


def test_a_prefix_that_the_device_has_lost_is_found_in_the_hosts_memory():
    small = SmallEngine(num_blocks=16, num_host_blocks=40, max_num_batched_tokens=64)
    prompts = [[number] * 33 for number in range(5)]
    for _ in range(2):
        for number, prompt in enumerate(prompts):
            small.add(number, prompt, max_tokens=2)
            small.run()
    assert all(small.tokens(n) == expected_tokens(p, 2, 0) * 2 for n, p in enumerate(prompts))
    assert small.scheduler.counters.cached_tokens == 5 * 32
    assert small.blocks.host.num_used == 40, "the least recently used give way"


def test_what_is_brought_in_a_step_is_not_lost_to_what_is_kept_in_it():
    host = HostBlocks(2)
    host.keep(b"first", 5)
    host.keep(b"second", 6)
    assert host.take_moves() == ([(5, 0), (6, 1)], [])
    host.hold([b"first"])
    host.keep(b"third", 7)  # takes the place of the second, though the first is older
    host.keep(b"fourth", 8)  # there is no place left in this step
    host.bring(b"first", 9)
    assert host.take_moves() == ([(7, 1)], [(0, 9)])
    assert b"first" in host and b"third" in host and b"second" not in host and b"fourth" not in host
    host.keep(b"fifth", 3)
    assert b"third" not in host, "the first was used last"
    host.check_integrity()


def test_a_block_that_is_filled_in_a_step_is_not_used_for_anything_else_in_it():
    """Its content is not there yet: it could neither be kept nor overwritten."""
    small = SmallEngine(num_blocks=4, num_host_blocks=4, block_size=4)
    prompt = list(range(9))
    small.add(0, prompt, max_tokens=1)
    small.run()
    small.add(1, [9] * 13, max_tokens=1)  # takes all blocks
    small.run()
    small.add(2, prompt, max_tokens=1)
    sequence = small.scheduler.waiting[0]
    found = small.blocks.match_prefix(sequence)
    assert found == [ON_HOST, ON_HOST]
    small.blocks.adopt(sequence, found)
    brought = set(sequence.blocks)
    small.blocks.free(sequence)
    assert small.blocks.num_free == 2 and not brought & {small.blocks._take_free() for _ in range(2)}
    small.blocks.end_planning()
    assert small.blocks.num_free == 2
