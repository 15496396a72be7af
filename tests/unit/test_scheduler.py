"""Decisions of scheduler and block manager, on a device that shows every wrong block (see
context_runner.py).
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from context_runner import VOCABULARY, expected_tokens, logits_after
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pagetide.engine import scheduler as scheduler_module
from pagetide.engine.admissions import num_rows_for
from pagetide.engine.blocks import BlockManager
from pagetide.engine.groups import _seed_of_sample
from pagetide.engine.plan_builder import MAX_REPORTED
from pagetide.types import EngineError, Guide, QueueFullError, Request, RequestError, SamplingParams
from small_engine import END_ID, FixedAnswer, SmallEngine


def test_one_request_gives_the_tokens_that_its_context_implies():
    small = SmallEngine()
    small.add(1, [1, 2, 3, 4, 5], max_tokens=10)
    small.run()
    assert small.tokens(1) == expected_tokens([1, 2, 3, 4, 5], 10, 0)
    assert small.reason(1) == ["length"]


def test_a_long_prompt_runs_in_chunks_beside_a_decode():
    small = SmallEngine()
    small.add(1, [1], max_tokens=20)
    small.step()
    small.add(2, list(range(40)), max_tokens=2)
    plan = small.scheduler.schedule()
    assert plan.counts.tolist() == [1, 15], (
        "the decode first, then as much of the prompt as the budget of 16 leaves"
    )


def test_equal_prefixes_are_computed_once_also_when_they_arrive_together():
    small = SmallEngine(max_num_batched_tokens=64)
    prefix = list(range(32))
    for number in range(3):
        small.add(number, [*prefix, number], max_tokens=1)
    small.run()
    assert small.runner.num_computed_tokens == 32 + 3
    assert [o.num_cached_tokens for o in sorted(small.outputs, key=lambda o: o.number)] == [0, 32, 32]


def test_a_block_is_found_only_behind_the_same_beginning():
    """The third prompt begins like the first and goes on like the second: only its first block has been
    computed.
    """
    small = SmallEngine()
    a, b, c, d = ([k] * 4 for k in (1, 2, 3, 4))
    for number, prompt in enumerate(([*a, *b, 9], [*c, *d, 9], [*a, *d, 9])):
        small.add(number, prompt, max_tokens=3)
        small.run()
        assert small.tokens(number) == expected_tokens(prompt, 3, 0)
    assert small.outputs[-1].num_cached_tokens == 4


def test_no_block_is_the_target_of_one_copy_and_the_source_of_another_in_a_step():
    """A holder of a copied block gives way (preemption) before another copy of the same step is made."""
    manager = BlockManager(4, 4, enable_prefix_caching=False)
    first, second, third, fourth = (
        SimpleNamespace(blocks=[], hashes=[], num_computed=0, num_published=0) for _ in range(4)
    )
    for owner, sharer in ((first, second), (third, fourth)):
        assert manager.grow(owner, 2) == []
        manager.fork(owner, sharer)
        owner.num_computed = sharer.num_computed = 2
    copies = manager.grow(second, 3)
    manager.free(first)
    copies += manager.grow(fourth, 3)
    assert copies == [(0, 2), (1, 3)], "block 0 is free, but the step still copies from it"
    manager.end_planning()
    assert manager.num_free == 1 and manager.grow(third, 5) == [] and third.blocks == [1, 0]


def test_prefix_caching_can_be_switched_off():
    small = SmallEngine(enable_prefix_caching=False)
    for number in range(2):
        small.add(number, list(range(32)), max_tokens=1)
    small.run()
    assert small.runner.num_computed_tokens == 64


def test_samples_share_the_prompts_blocks_and_copy_only_the_last_partial_one():
    small = SmallEngine(max_num_batched_tokens=64)
    small.add(1, list(range(18)), n=4, max_tokens=4)
    small.step()
    assert small.blocks.num_used == 5, "four full blocks and a partial one, for all samples together"
    small.step()
    assert small.blocks.num_used == 4 + 4, "each sample has a last block of its own"
    small.run()
    assert small.runner.num_computed_tokens == 18 + 4 * 3
    for index in range(4):
        assert small.tokens(1, index) == expected_tokens(list(range(18)), 4, _seed_of_sample(0, index))


def test_the_youngest_is_preempted_and_gives_the_same_tokens_later():
    small = SmallEngine(num_blocks=16)
    for number in range(4):
        small.add(number, [number + 10] * 6, max_tokens=40)
    small.run()
    assert small.scheduler.counters.preemptions > 0
    for number in range(4):
        assert small.tokens(number) == expected_tokens([number + 10] * 6, 40, 0)


def test_end_token_stops_unless_ignored_and_not_before_min_tokens():
    prompt = [3, 1]
    tokens = expected_tokens(prompt, 32, 0)
    small = SmallEngine()
    end = tokens[4]
    small.add(1, prompt, ignore_eos=False, end_id=end, max_tokens=32)
    small.add(2, prompt, ignore_eos=True, end_id=end, max_tokens=32)
    small.run()
    assert small.tokens(1) == tokens[: tokens.index(end) + 1] and small.reason(1) == ["stop"]
    assert small.tokens(2) == tokens and small.reason(2) == ["length"]
    assert end != END_ID


def test_min_tokens_is_told_to_the_sampler_for_the_first_tokens_only():
    small = SmallEngine()
    small.add(1, [1, 2], ignore_eos=False, min_tokens=2, max_tokens=4)
    masked = []
    while small.engine.has_work:
        plan = small.scheduler.schedule()
        if plan is None:
            break
        masked.append(plan.has_edits)
        small.runner.forward(plan)
        small.runner.sample(plan)
        small.scheduler.commit(plan, small.runner.wait(plan))
    assert masked[:3] == [True, True, False]


def test_cancelled_request_frees_its_blocks_within_two_steps():
    small = SmallEngine()
    small.add(1, list(range(30)), max_tokens=30)
    small.add(2, list(range(30, 40)), n=2, max_tokens=30)
    for _ in range(4):
        small.step()
    small.engine.cancel([1, 2, 99])
    small.step()
    small.step()
    assert small.blocks.num_used == 0
    assert small.reason(1) == ["cancelled"] and small.reason(2, 1) == ["cancelled"]


def test_cancel_by_name_finds_all_requests_of_that_name():
    small = SmallEngine()
    for number, name in ((5, "same"), (6, "other"), (7, "same")):
        params = SamplingParams(max_tokens=30, seed=0, ignore_eos=True)
        small.scheduler.add(Request(number=number, prompt_ids=[number], params=params, request_id=name))
    small.step()
    small.engine.cancel([], "nobody")
    small.engine.cancel([], "same")
    small.run()
    assert [small.reason(number) for number in (5, 6, 7)] == [["cancelled"], ["length"], ["cancelled"]]


def test_full_queue_is_refused_at_once():
    small = SmallEngine(max_queued_requests=2)
    small.add(1, [1], max_tokens=1)
    small.add(2, [1], max_tokens=1)
    with pytest.raises(QueueFullError, match="Maximum queue size of 2 requests reached"):
        small.add(3, [1], max_tokens=1)


def test_static_batching_admits_only_when_the_batch_has_ended():
    small = SmallEngine(batching="static", max_num_batched_tokens=64)
    for number, length in enumerate((2, 9, 2, 2, 2)):
        small.add(number, [number], max_tokens=length)
    running = []
    while small.engine.has_work:
        small.step()
        running.append({s.request.number for s in small.scheduler.running})
    assert {1} in running, "the longest of the first batch ends alone"
    assert not any(4 in step and 1 in step for step in running)


def test_contiguous_reservation_takes_all_blocks_of_the_longest_answer_at_once():
    small = SmallEngine(kv_reservation="contiguous", max_num_batched_tokens=64)
    small.add(1, [1, 2, 3], max_tokens=29)
    small.step()
    assert small.blocks.num_used == 8


def test_streams_come_in_order_and_nothing_follows_the_last_output():
    small = SmallEngine()
    small.add(1, [4, 5], max_tokens=12, stream=True)
    small.run()
    assert [o.finish_reason for o in small.outputs] == [""] * 11 + ["length"]
    assert small.tokens(1) == expected_tokens([4, 5], 12, 0)


def test_a_sample_that_still_has_to_fork_keeps_its_row_while_others_want_it():
    """Two samples of a prompt of three chunks, and a request that comes meanwhile, on two rows."""
    small = SmallEngine(max_num_seqs=2)
    small.add(1, list(range(40)), n=2, max_tokens=4)
    small.add(2, [1, 2], max_tokens=4)
    small.run()
    assert small.tokens(1, 1) == expected_tokens(list(range(40)), 4, _seed_of_sample(0, 1))
    assert small.tokens(2) == expected_tokens([1, 2], 4, 0)


def test_eight_samples_of_a_long_prompt_hold_its_blocks_once():
    small = SmallEngine(
        num_blocks=128, block_size=16, max_model_len=1200, max_num_seqs=8, max_num_batched_tokens=1024
    )
    small.add(1, [i % 50 for i in range(1000)], n=8, max_tokens=4, timings=True)
    small.step()
    assert small.blocks.num_used == 63, "1,000 tokens, once"
    small.step()
    assert small.blocks.num_used == 62 + 8, "only the last, partial block is copied, once for each sample"
    small.run()
    assert small.outputs[-1].timings.new_blocks == 63 and small.outputs[-1].timings.reused_blocks == 0


def test_the_best_of_several_samples_are_those_with_the_highest_log_probability():
    small = SmallEngine()
    small.add(1, [5, 6], n=2, best_of=4, max_tokens=5, stream=True)
    small.run()

    def logprob(seed):
        context, total = [5, 6], 0.0
        for _ in range(5):
            values = logits_after(context, seed)
            total += values.max()
            context.append(int(values.argmax()))
        return total, context[2:]

    best = sorted((logprob(_seed_of_sample(0, i)) for i in range(4)), reverse=True)[:2]
    assert [o.ids for o in small.outputs] == [ids for _, ids in best], "one output for each, at the end"
    assert [o.cumulative_logprob for o in small.outputs] == pytest.approx([total for total, _ in best])


def test_log_probabilities_come_with_their_tokens():
    small = SmallEngine()
    small.add(1, [5, 6], max_tokens=3, logprobs=2, stream=True)
    small.run()
    context = [5, 6]
    for output in small.outputs:
        for token, score in zip(output.ids, output.scores, strict=True):
            values = logits_after(context, 0)
            order = np.argsort(-values)
            assert (token, score.rank, score.top_ids) == (order[0], 1, order[:2].tolist())
            assert score.logprob == pytest.approx(values[token])
            context.append(token)


@pytest.mark.parametrize("num_blocks, budget", [(64, 16), (8, 5)])
def test_every_prompt_token_but_the_first_is_scored_once_also_in_chunks(num_blocks, budget):
    prompt = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
    small = SmallEngine(num_blocks=num_blocks, max_num_batched_tokens=budget, max_model_len=28)
    for number in range(3):
        small.add(number, prompt, max_tokens=12, prompt_logprobs=1, context_logits=True)
    small.run()
    for output in small.outputs:
        expected = [logits_after(prompt[:i], 0)[prompt[i]] for i in range(1, len(prompt))]
        assert [score.logprob for score in output.prompt_scores] == pytest.approx(expected)
        logits = np.frombuffer(output.context_logits, np.float32).reshape(len(prompt), -1)
        assert logits == pytest.approx(
            np.array([logits_after(prompt[: i + 1], 0) for i in range(len(prompt))]), rel=1e-5, abs=1e-5
        )


def test_a_step_looks_at_few_of_the_prompt_tokens_that_are_reported():
    """Each costs a row of logits: a long prompt would fill a device's memory."""
    small = SmallEngine(num_blocks=1000, max_model_len=1500, max_num_batched_tokens=1400)
    for number in range(2):
        small.add(number, [1 + i % 40 for i in range(700)], max_tokens=3, prompt_logprobs=0)
    small.add(2, [7] * 60, max_tokens=3)
    while small.engine.has_work:
        small.step()
        assert len(small.runner.looked_at) <= MAX_REPORTED + 3
    for number in range(2):
        reported = [score for o in small.outputs if o.number == number for score in o.prompt_scores]
        assert len(reported) == 699 and small.reason(number) == ["length"]
    assert len(small.tokens(2)) == 3


def test_priority_goes_before_arrival_and_the_last_in_order_gives_way():
    small = SmallEngine(max_num_seqs=1)
    for number, priority in ((1, 0), (2, 5), (3, -1)):
        small.add(number, [number], max_tokens=2, priority=priority)
    small.run()
    assert [o.number for o in small.outputs] == [3, 1, 2]
    small = SmallEngine(num_blocks=16)
    for number, priority in ((1, 1), (2, 0)):
        small.add(number, [number] * 20, max_tokens=30, priority=priority)
    small.run()
    assert small.scheduler.counters.preemptions and small.outputs[0].number == 2


def test_a_request_whose_time_is_up_gets_what_it_has():
    small = SmallEngine(max_num_seqs=1)
    small.add(1, [1], max_tokens=60, deadline_ns=100)
    small.add(2, [2], max_tokens=60, deadline_ns=50)
    for _ in range(4):
        small.step()
    small.clock_ns = 60
    small.step()
    assert small.reason(2) == ["timeout"] and small.tokens(2) == []
    small.clock_ns = 100
    small.run()
    assert small.reason(1) == ["timeout"] and 3 <= len(small.tokens(1)) < 10
    assert small.scheduler.counters.timed_out == 2 and small.blocks.num_used == 0


@pytest.mark.parametrize("wide", [{"n": 4}, {"beam_width": 4, "n": 4}], ids=["samples", "beams"])
def test_who_wants_many_rows_keeps_nobody_waiting_and_is_not_overtaken_for_ever(wide):
    small = SmallEngine(num_blocks=200)
    small.add(1, [1], max_tokens=40)
    small.step()
    small.add(2, [2], max_tokens=5, **wide)
    for number in range(3, 9):
        small.add(number, [number], max_tokens=3)
    small.run_until(lambda: all(small.reason(number) for number in range(3, 9)))
    assert not small.reason(1) and not small.tokens(2)
    number = 8
    while not small.reason(2):
        number += 1
        small.add(number, [number % 50], max_tokens=30)
        small.step()
        assert number < 90
    waited = len(small.tokens(1)) - 40 if not small.reason(1) else 0
    assert waited == 0 and small.scheduler.counters.preemptions > 0, "those behind have given way"
    small.run()
    for other in (1, *range(3, number + 1)):
        long = 40 if other == 1 else 3 if other < 9 else 30
        assert small.tokens(other) == expected_tokens([other % 50], long, 0), other
    assert small.blocks.num_used == 0


def test_those_who_give_way_do_so_once_and_for_all():
    """Rows that an overtaker will want for its samples count as well, or the others would come and go."""
    small = SmallEngine(
        num_blocks=2000, max_num_seqs=8, max_model_len=4000, max_num_batched_tokens=MAX_REPORTED + 64
    )
    for number in (1, 2):
        small.add(number, [number], max_tokens=2)
    small.step()
    small.add(3, [3], max_tokens=5, n=7)
    prompt = [i % 50 for i in range(6 * MAX_REPORTED)]  # as long as it runs, the budget has room for others
    small.add(4, prompt, max_tokens=2, n=4, prompt_logprobs=0)
    for number in (5, 6):
        small.add(number, [number], max_tokens=30)
    small.run()
    assert small.scheduler.counters.preemptions == 3
    assert [len(small.tokens(3, index)) for index in range(7)] == [5] * 7
    assert small.tokens(5) == expected_tokens([5], 30, 0) and small.blocks.num_used == 0


@pytest.mark.parametrize("ahead", [0, 1], ids=["before it", "of a higher priority"])
def test_overtakers_give_way_to_all_whom_they_have_passed(ahead):
    """Also if the one who was first in line then has gone."""
    small = SmallEngine(num_blocks=400)
    small.add(1, [1], max_tokens=6)
    small.step()
    for number, priority in ((2, 1 - ahead), (3, 1)):
        small.add(number, [number], max_tokens=5, n=4, priority=priority)
    for number in (4, 5, 6):
        small.add(number, [number], max_tokens=32, priority=1)
    small.step()
    small.engine.cancel([2])
    small.run_until(lambda: bool(small.reason(3)))
    assert not any(small.reason(number) for number in (4, 5, 6))
    small.run()
    assert small.tokens(6) == expected_tokens([6], 32, 0)


def test_a_step_does_not_look_past_all_who_lack_rows(monkeypatch):
    """The queue may hold thousands of them, and each step would."""
    looked_at: list[int] = []

    def num_rows(sequence):
        looked_at.append(sequence.request.number)
        return num_rows_for(sequence)

    monkeypatch.setattr(scheduler_module, "num_rows_for", num_rows)
    small = SmallEngine(num_blocks=200)
    small.add(0, [1], max_tokens=30)
    small.step()
    for number in range(1, 501):
        small.add(number, [number % 50], max_tokens=2, n=4)
    looked_at.clear()
    small.step()
    assert len(looked_at) <= 2 * scheduler_module._MOST_PASSED


def test_prompts_with_different_salts_share_no_blocks():
    small = SmallEngine()
    for number, salt in enumerate(("", "a", "b", "a")):
        small.add(number, list(range(17)), max_tokens=1, salt=salt)
        small.run()
    assert [o.num_cached_tokens for o in small.outputs] == [0, 0, 0, 16]


def test_a_guided_answer_waits_for_its_grammar_and_nobody_else_does():
    small = SmallEngine()
    small.add(1, [1], max_tokens=10, guide=Guide("regex", "x"))
    small.add(2, [2], max_tokens=3)
    while not small.reason(2):
        small.step()
    assert not small.tokens(1)
    small.guides.finish("x", [9, 8, 9])
    small.run()
    assert small.tokens(1) == [9, 8, 9, END_ID] and small.reason(1) == ["stop"]


@pytest.mark.parametrize(
    "error, reason",
    [(RequestError("no regex"), "no regex"), (OverflowError("bug"), "the engine failed at this request")],
)
def test_a_guide_that_is_none_is_refused_and_nobody_else_is(error, reason):
    small = SmallEngine()
    small.add(1, [1], max_tokens=10, guide=Guide("regex", "x"))
    small.add(2, [2], max_tokens=3)
    small.guides.futures["x"].set_exception(error)
    small.run_until(lambda: bool(small.reason(2)))
    (refusal,) = small.refusals
    assert refusal.number == 1 and reason in str(refusal.error)
    assert isinstance(refusal.error, RequestError) == isinstance(error, RequestError)
    assert not small.engine.has_work


@pytest.mark.parametrize("min_tokens, stop_words, expected", [(2, (), [3, END_ID]), (0, ("ij",), [3, 8, 9])])
def test_a_grammar_goes_before_min_tokens_and_stops_end_it(min_tokens, stop_words, expected):
    small = SmallEngine()
    small.add(
        1, [1], max_tokens=10, min_tokens=5 if min_tokens else 0, stop=stop_words, guide=Guide("regex", "x")
    )
    small.guides.finish("x", [3] if min_tokens else [3, 8, 9, 4])
    small.run()
    assert small.tokens(1) == expected and small.reason(1) == ["stop"]


def beams_alone(prompt: list[int], width: int, max_tokens: int, **params) -> list[list[int]]:
    alone = SmallEngine(num_blocks=200, max_num_seqs=width, max_model_len=64)
    alone.add(0, prompt, beam_width=width, n=width, max_tokens=max_tokens, **params)
    alone.run()
    return [o.ids for o in sorted(alone.outputs, key=lambda o: o.index)]


def test_a_wide_enough_beam_search_finds_the_likeliest_answer():
    """With as many beams as there are pairs of tokens nothing is lost: the best answers are those of trying
    all.
    """
    prompt = [4, 2]
    everything = {}
    for a in range(VOCABULARY):
        for b in range(VOCABULARY):
            everything[a, b] = logits_after(prompt, 0)[a] + logits_after([*prompt, a], 0)[b]
    best = sorted(everything, key=lambda pair: -everything[pair])[:20]
    small = SmallEngine(num_blocks=400, max_num_seqs=VOCABULARY, max_num_batched_tokens=64)
    small.add(1, prompt, beam_width=VOCABULARY, n=20, max_tokens=2)
    small.run()
    assert [tuple(o.ids) for o in small.outputs] == best
    assert [o.cumulative_logprob for o in small.outputs] == pytest.approx([everything[pair] for pair in best])


def test_beams_share_the_prompts_blocks():
    small = SmallEngine(
        num_blocks=128, block_size=16, max_num_batched_tokens=64, max_num_seqs=8, max_model_len=128
    )
    small.add(1, [i % 50 for i in range(60)], beam_width=8, max_tokens=20)
    used = []
    while small.engine.has_work:
        small.step()
        used.append(small.blocks.num_used)
    assert max(used) <= 3 + 8 * 2


def test_beams_ask_each_other_for_no_more_than_they_need():
    """What runs beside a search, with other ends and widths, changes nothing of it."""
    alone = beams_alone([4, 2], 2, 8, stop=("ab", "q"))
    small = SmallEngine(num_blocks=200, max_num_seqs=8, max_num_batched_tokens=64)
    small.add(1, [4, 2], beam_width=2, n=2, max_tokens=8, stop=("ab", "q"))
    small.add(2, [5, 6], beam_width=6, n=1, max_tokens=8, stop_token_ids=tuple(range(20)))
    small.run()
    assert [small.tokens(1, index) for index in range(2)] == alone


def test_a_search_whose_texts_are_all_stop_texts_ends_with_what_it_has():
    small = SmallEngine(num_blocks=200, max_num_seqs=8, max_num_batched_tokens=64)
    small.add(1, [4, 2], beam_width=4, n=4, max_tokens=8, stop=tuple("abcdefghijklmnopqrstuvwxyz"))
    small.run()
    assert [small.reason(1, index) for index in range(4)] == [["stop"]] * 4


def test_preempted_beams_do_not_wait_for_each_other():
    """One token a step: of two beams the first has its candidates and is preempted before the second, which
    has none.
    """
    small = SmallEngine(max_num_batched_tokens=1)
    small.add(1, [1, 2], beam_width=2, n=2, max_tokens=12)
    scheduler = small.scheduler

    def step_alone() -> None:
        plan = scheduler.schedule()
        small.runner.forward(plan)
        small.runner.sample(plan)
        scheduler.commit(plan, small.runner.wait(plan))

    while [beam.candidates is not None for beam in scheduler.running] != [True, False]:
        step_alone()
    for beam in list(scheduler.running):
        scheduler._preempt(beam)
    small.run(max_steps=200)
    assert [small.tokens(1, index) for index in range(2)] == beams_alone([1, 2], 2, 12)


def test_a_cancelled_beam_search_gives_what_it_has_and_frees_its_blocks():
    small = SmallEngine()
    small.add(1, [1, 2, 3], beam_width=3, n=2, max_tokens=30)
    for _ in range(8):
        small.step()
    small.engine.cancel([1])
    small.run()
    assert [o.finish_reason for o in small.outputs] == ["cancelled"] * 2 and small.outputs[0].ids
    assert small.blocks.num_used == 0


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
@pytest.mark.parametrize("rule", [{"beam_width": 3, "n": 3}, {"n": 3}, {"n": 2, "best_of": 3}])
def test_a_request_that_ends_early_has_as_many_ended_answers_as_were_asked_for(rule, steps):
    """While it waits, while its prompt runs in chunks, and while its samples or beams run."""
    for end, reason in (("cancel", "cancelled"), ("deadline", "timeout")):
        small = SmallEngine(max_num_batched_tokens=8)
        small.add(1, list(range(20)), max_tokens=30, deadline_ns=100 if end == "deadline" else 0, **rule)
        for _ in range(steps):
            small.step()
        small.clock_ns = 100
        if end == "cancel":
            small.engine.cancel([1])
        small.run()
        assert [small.reason(1, index) for index in range(rule["n"])] == [[reason]] * rule["n"]
        assert all(np.isfinite(o.cumulative_logprob) for o in small.outputs) and small.blocks.num_used == 0


class Broken(FixedAnswer):
    """A grammar that fails with its second token."""

    def fill(self, mask: np.ndarray) -> None:
        if len(self.left) < 3:
            raise RequestError("too large")
        FixedAnswer.fill(self, mask)

    def advance(self, token: int) -> None:
        if len(self.left) < 3:
            raise ZeroDivisionError("bug")
        FixedAnswer.advance(self, token)


@pytest.mark.parametrize("method, error", [("fill", RequestError), ("advance", EngineError)])
def test_a_request_that_fails_in_a_step_fails_alone(method, error):
    small = SmallEngine()
    small.add(1, [1], max_tokens=10, n=2, stream=True, guide=Guide("regex", "x"))
    small.add(2, [2], max_tokens=9)
    own = type("Own", (FixedAnswer,), {method: getattr(Broken, method)})
    small.guides.compile(Guide("regex", "x")).set_result(lambda: own([9, 8, 6, 5]))
    small.run()
    (refusal,) = small.refusals
    assert refusal.number == 1 and type(refusal.error) is error and small.reason(1) == []
    assert small.tokens(2) == expected_tokens([2], 9, 0) and small.blocks.num_used == 0


def test_a_row_without_any_token_ends_its_request_with_an_error():
    small = SmallEngine()
    small.add(1, [1], max_tokens=10, guide=Guide("regex", "x"))
    small.add(2, [2], max_tokens=9)
    nothing = type("Nothing", (FixedAnswer,), {"fill": lambda self, mask: mask.fill(0)})
    small.guides.compile(Guide("regex", "x")).set_result(lambda: nothing([1]))
    small.run()
    (refusal,) = small.refusals
    assert refusal.number == 1 and "no token is left to choose after 0 tokens" in str(refusal.error)
    assert small.tokens(2) == expected_tokens([2], 9, 0)


def test_what_cannot_become_a_sequence_is_refused_and_nothing_is_left_of_it():
    small = SmallEngine()
    with pytest.raises(EngineError, match="the engine failed at this request"):
        small.add(1, [1], temperature=None)
    assert not small.engine.has_work
    small.add(1, [1], max_tokens=2**31 - 1, min_tokens=2**31 - 1, ignore_eos=False)
    small.run()
    assert small.reason(1) == ["length"]


@pytest.mark.parametrize("overlaps", [True, False])
def test_a_request_that_comes_while_a_step_runs_is_in_the_next(overlaps):
    """Where the device computes beside the host, the next step has been launched by then."""
    small = SmallEngine(overlaps=overlaps, max_num_batched_tokens=64)
    small.add(1, [1, 2, 3], max_tokens=30)
    for _ in range(3):
        small.step()
    small.add(2, [4, 5], max_tokens=3, stream=True)
    steps = 0
    while not small.tokens(2):
        small.step()
        steps += 1
    assert steps == (2 if overlaps else 1)
    small.run()
    assert small.tokens(1) == expected_tokens([1, 2, 3], 30, 0) and small.tokens(2) == expected_tokens(
        [4, 5], 3, 0
    )


@pytest.mark.parametrize("overlaps", [True, False])
def test_masks_are_those_of_all_tokens_before(overlaps):
    small = SmallEngine(overlaps=overlaps)
    small.add(1, [1], max_tokens=10, guide=Guide("regex", "x"))
    small.add(2, [2], max_tokens=10)
    small.guides.compile(Guide("regex", "x")).set_result(lambda: FixedAnswer([9, 8, 9, 8, 3]))
    small.run()
    assert small.tokens(1) == [9, 8, 9, 8, 3, END_ID] and small.tokens(2) == expected_tokens([2], 10, 0)


requests = st.lists(
    st.tuples(
        st.integers(0, 3),  # which common prefix
        st.integers(0, 30),  # how long it is
        st.lists(st.integers(0, 49), min_size=1, max_size=12),  # own tokens
        st.integers(1, 20),  # max_tokens
        st.integers(1, 4),  # samples, or beams
        st.booleans(),  # beams
        st.integers(0, 12),  # arrives so many steps later
        st.one_of(st.none(), st.integers(0, 25)),  # cancelled after so many steps
        st.sampled_from([0, 0, 1, 2, 3, 4]),  # adapter
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
@given(
    requests=requests,
    num_blocks=st.integers(16, 40),
    budget=st.integers(1, 40),
    block_size=st.sampled_from([4, 5, 16]),
    caching=st.booleans(),
    batching=st.sampled_from(["continuous", "static"]),
    reservation=st.sampled_from(["paged", "contiguous"]),
    overlaps=st.booleans(),
    num_host_blocks=st.sampled_from([0, 2, 9, 60]),
    num_guesses=st.sampled_from([0, 1, 3, 8]),
)
def test_random_workloads_see_their_own_context_and_leave_every_block_free(
    requests,
    num_blocks,
    budget,
    block_size,
    caching,
    batching,
    reservation,
    overlaps,
    num_host_blocks,
    num_guesses,
):
    small = SmallEngine(
        overlaps=overlaps,
        num_host_blocks=num_host_blocks if caching else 0,
        num_blocks=num_blocks,
        block_size=block_size,
        max_num_batched_tokens=budget,
        enable_prefix_caching=caching,
        batching=batching,
        kv_reservation=reservation,
        max_loras=2,
        num_speculative_tokens=num_guesses,
        prompt_lookup_min=1,
    )
    arrivals = sorted((sum(r[6] for r in requests[: i + 1]), i) for i in range(len(requests)))
    prompts = [[(kind * 7 + i) % 50 for i in range(length)] + own for kind, length, own, *_ in requests]
    cancels = {i: at + requests[i][7] for at, i in arrivals if requests[i][7] is not None}
    beams = {
        number
        for number, r in enumerate(requests)
        if r[5] and r[4] > 1 and fits(len(prompts[number]) + r[3], r[4], num_blocks, block_size)
    }
    step = 0
    while arrivals or small.engine.has_work:
        while arrivals and arrivals[0][0] <= step:
            number = arrivals.pop(0)[1]
            _, _, _, max_tokens, n, *_, adapter = requests[number]
            width = n if number in beams else 1
            small.add(
                number, prompts[number], max_tokens=max_tokens, n=n, beam_width=width,
                stream=bool(number % 2), lora_name=str(adapter or ""), seed=1,
            )  # fmt: skip
        small.engine.cancel([i for i, at in cancels.items() if at == step])
        small.step()
        step += 1
        assert step < 20_000
    assert small.blocks.num_used == 0
    for number, (_, _, _, max_tokens, n, _, _, cancelled, adapter) in enumerate(requests):
        expected = [
            expected_tokens(prompts[number], max_tokens, _seed_of_sample(1, index), adapter)
            for index in range(n)
        ]
        if number in beams:
            expected = beams_alone(prompts[number], n, max_tokens, lora_name=str(adapter or ""), seed=1)
        for index in range(n):
            tokens, reasons = small.tokens(number, index), small.reason(number, index)
            if cancelled is None:
                assert (tokens, reasons) == (expected[index], ["length"]), number
            else:
                assert reasons in (["length"], ["cancelled"]), "as many ended answers as were asked for"
                assert number in beams or tokens == expected[index][: len(tokens)], number


def fits(num_tokens: int, width: int, num_blocks: int, block_size: int) -> bool:
    """What contract.checks makes sure of: all beams together must find room."""
    return width * (-(-num_tokens // block_size) + 1) <= num_blocks
