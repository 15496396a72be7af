"""Decisions of scheduler and block manager, on a device that shows every wrong block (see context_runner.py)."""

from __future__ import annotations

import pytest
from conftest import END_ID, SmallEngine
from context_runner import expected_tokens
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pagetide.engine.strategies import _seed_of_sample
from pagetide.types import QueueFullError


def test_one_request_gives_the_tokens_that_its_context_implies(engine):
    small = engine()
    small.add(1, [1, 2, 3, 4, 5], max_tokens=10)
    small.run()
    assert small.tokens(1) == expected_tokens([1, 2, 3, 4, 5], 10, 0)
    assert small.reason(1) == ["length"]


def test_a_long_prompt_runs_in_chunks_beside_a_decode(engine):
    small = engine()
    small.add(1, [1], max_tokens=20)
    small.step()
    small.add(2, list(range(40)), max_tokens=2)
    plan = small.scheduler.schedule()
    assert plan.counts.tolist() == [1, 15], "the decode first, then as much of the prompt as the budget of 16 leaves"


def test_equal_prefixes_are_computed_once_also_when_they_arrive_together(engine):
    small = engine(max_num_batched_tokens=64)
    prefix = list(range(32))
    for number in range(3):
        small.add(number, [*prefix, number], max_tokens=1)
    small.run()
    assert small.runner.num_computed_tokens == 32 + 3
    assert [o.num_cached_tokens for o in sorted(small.outputs, key=lambda o: o.number)] == [0, 32, 32]


def test_a_block_is_found_only_behind_the_same_beginning(engine):
    """The third prompt begins like the first and goes on like the second: only its first block has been computed."""
    small = engine()
    a, b, c, d = ([k] * 4 for k in (1, 2, 3, 4))
    for number, prompt in enumerate(([*a, *b, 9], [*c, *d, 9], [*a, *d, 9])):
        small.add(number, prompt, max_tokens=3)
        small.run()
        assert small.tokens(number) == expected_tokens(prompt, 3, 0)
    assert small.outputs[-1].num_cached_tokens == 4


def test_prefix_caching_can_be_switched_off(engine):
    small = engine(enable_prefix_caching=False)
    for number in range(2):
        small.add(number, list(range(32)), max_tokens=1)
    small.run()
    assert small.runner.num_computed_tokens == 64


def test_samples_share_the_prompts_blocks_and_copy_only_the_last_partial_one(engine):
    small = engine(max_num_batched_tokens=64)
    small.add(1, list(range(18)), n=4, max_tokens=4)
    small.step()
    assert small.blocks.num_used == 5, "four full blocks and a partial one, for all samples together"
    small.step()
    assert small.blocks.num_used == 4 + 4, "each sample has a last block of its own"
    small.run()
    assert small.runner.num_computed_tokens == 18 + 4 * 3
    for index in range(4):
        assert small.tokens(1, index) == expected_tokens(list(range(18)), 4, _seed_of_sample(0, index))


def test_the_youngest_is_preempted_and_gives_the_same_tokens_later(engine):
    small = engine(num_blocks=16)
    for number in range(4):
        small.add(number, [number + 10] * 6, max_tokens=40)
    small.run()
    assert small.scheduler.counters.preemptions > 0
    for number in range(4):
        assert small.tokens(number) == expected_tokens([number + 10] * 6, 40, 0)


def test_end_token_stops_unless_ignored_and_not_before_min_tokens(engine):
    prompt = [3, 1]
    tokens = expected_tokens(prompt, 32, 0)
    small = engine()
    end = tokens[4]
    small.add(1, prompt, ignore_eos=False, end_id=end, max_tokens=32)
    small.add(2, prompt, ignore_eos=True, end_id=end, max_tokens=32)
    small.run()
    assert small.tokens(1) == tokens[: tokens.index(end) + 1] and small.reason(1) == ["stop"]
    assert small.tokens(2) == tokens and small.reason(2) == ["length"]
    assert end != END_ID


def test_min_tokens_is_told_to_the_sampler_for_the_first_tokens_only(engine):
    small = engine()
    small.add(1, [1, 2], ignore_eos=False, min_tokens=2, max_tokens=4)
    masked = []
    while small.loop.has_work:
        plan = small.scheduler.schedule()
        if plan is None:
            break
        masked.append(plan.masks_end_ids)
        small.runner.forward(plan)
        small.runner.sample(plan)
        small.scheduler.commit(plan, small.runner.wait(plan))
    assert masked[:3] == [True, True, False]


def test_cancelled_request_frees_its_blocks_within_two_steps(engine):
    small = engine()
    small.add(1, list(range(30)), max_tokens=30)
    small.add(2, list(range(30, 40)), n=2, max_tokens=30)
    for _ in range(4):
        small.step()
    small.scheduler.cancel([1, 2, 99])
    small.step()
    small.step()
    assert small.blocks.num_used == 0
    assert small.reason(1) == ["cancelled"] and small.reason(2, 1) == ["cancelled"]


def test_cancel_by_name_finds_all_requests_of_that_name(engine):
    small = engine()
    small.add(5, [1], max_tokens=30)
    assert small.scheduler.numbers_of("r5") == [5]
    assert small.scheduler.numbers_of("other") == []


def test_full_queue_is_refused_at_once(engine):
    small = engine(max_queued_requests=2)
    small.add(1, [1], max_tokens=1)
    small.add(2, [1], max_tokens=1)
    with pytest.raises(QueueFullError, match="Maximum queue size of 2 requests reached"):
        small.add(3, [1], max_tokens=1)


def test_static_batching_admits_only_when_the_batch_has_ended(engine):
    small = engine(batching="static", max_num_batched_tokens=64)
    for number, length in enumerate((2, 9, 2, 2, 2)):
        small.add(number, [number], max_tokens=length)
    running = []
    while small.loop.has_work:
        small.step()
        running.append({s.request.number for s in small.scheduler.running})
    assert {1} in running, "the longest of the first batch ends alone"
    assert not any(4 in step and 1 in step for step in running)


def test_contiguous_reservation_takes_all_blocks_of_the_longest_answer_at_once(engine):
    small = engine(kv_reservation="contiguous", max_num_batched_tokens=64)
    small.add(1, [1, 2, 3], max_tokens=29)
    small.step()
    assert small.blocks.num_used == 8


def test_streams_come_in_order_and_nothing_follows_the_last_output(engine):
    small = engine()
    small.add(1, [4, 5], max_tokens=12, stream=True)
    small.run()
    assert [o.finish_reason for o in small.outputs] == [""] * 11 + ["length"]
    assert small.tokens(1) == expected_tokens([4, 5], 12, 0)


requests = st.lists(
    st.tuples(
        st.integers(0, 3),  # which common prefix
        st.integers(0, 30),  # how long it is
        st.lists(st.integers(0, 49), min_size=1, max_size=12),  # own tokens
        st.integers(1, 20),  # max_tokens
        st.integers(1, 4),  # samples
        st.integers(0, 12),  # arrives so many steps later
        st.one_of(st.none(), st.integers(0, 25)),  # cancelled after so many steps
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
@given(
    requests=requests,
    num_blocks=st.integers(16, 40),
    budget=st.integers(1, 40),
    block_size=st.sampled_from([4, 5, 16]),
    caching=st.booleans(),
    batching=st.sampled_from(["continuous", "static"]),
    reservation=st.sampled_from(["paged", "contiguous"]),
)
def test_random_workloads_see_their_own_context_and_leave_every_block_free(requests, num_blocks, budget, block_size, caching, batching, reservation):
    small = SmallEngine(
        num_blocks=num_blocks,
        block_size=block_size,
        max_num_batched_tokens=budget,
        enable_prefix_caching=caching,
        batching=batching,
        kv_reservation=reservation,
    )
    arrivals = sorted((sum(r[5] for r in requests[: i + 1]), i) for i in range(len(requests)))
    prompts = [[(kind * 7 + i) % 50 for i in range(length)] + own for kind, length, own, *_ in requests]
    cancels = {i: at + requests[i][6] for at, i in arrivals if requests[i][6] is not None}
    step = 0
    while arrivals or small.loop.has_work:
        while arrivals and arrivals[0][0] <= step:
            number = arrivals.pop(0)[1]
            _, _, _, max_tokens, n, _, _ = requests[number]
            small.add(number, prompts[number], max_tokens=max_tokens, n=n, stream=bool(number % 2))
        small.scheduler.cancel([i for i, at in cancels.items() if at == step])
        small.step()
        step += 1
        assert step < 20_000
    assert small.blocks.num_used == 0
    for number, (_, _, _, max_tokens, n, _, cancelled) in enumerate(requests):
        for index in range(n):
            expected = expected_tokens(prompts[number], max_tokens, _seed_of_sample(0, index))
            tokens = small.tokens(number, index)
            assert tokens == expected[: len(tokens)], number
            assert small.reason(number, index) in ([["length"], ["cancelled"]] if cancelled is not None else [["length"]])
            assert cancelled is not None or len(tokens) == max_tokens
