"""What is guessed of a sequence's next tokens, how far, and what becomes of it in the engine."""

from __future__ import annotations

import pytest
from context_runner import expected_tokens
from hypothesis import given
from hypothesis import strategies as st
from pagetide.engine.drafts import Places, PromptLookup, Speculation, Speculator
from pagetide.engine.groups import _seed_of_sample
from small_engine import SmallEngine


def followers(token_ids: list[int], num_alike: int, count: int) -> list[int]:
    """The rule of PromptLookup without its table."""
    last = token_ids[len(token_ids) - num_alike :]
    for end in range(len(token_ids) - 1, num_alike - 1, -1):
        if token_ids[end - num_alike : end] == last:
            found = list(token_ids)
            for _ in range(count):
                found.append(found[len(found) - len(token_ids) + end])
            return found[len(token_ids) :]
    return []


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=8),
    st.integers(1, 4),
    st.integers(1, 9),
)
def test_what_followed_the_last_tokens_where_they_stood_last_is_guessed(pieces, num_alike, count):
    """Of two answers to one prompt, the first piece."""
    prompt = Places(num_alike)
    for answer in (pieces[1::2], pieces[2::2]):
        lookup, token_ids = PromptLookup(num_alike, prompt, len(pieces[0])), pieces[0]
        for piece in answer:
            token_ids = token_ids + piece
            assert lookup.propose(token_ids, count) == followers(token_ids, num_alike, count)


def test_a_long_prompt_is_noted_over_several_steps():
    token_ids = [*range(5000), 4990, 4991]
    lookup = PromptLookup(2, Places(2), 5000)
    found = [lookup.propose([*token_ids, *range(4992, 4992 + step)], 2) for step in range(4)]
    assert found == [[], [], [4994, 4995], [4995, 4996]]


@pytest.mark.parametrize("token_ids", [[], [1], [1, 2]])
def test_nothing_is_guessed_of_too_few_tokens(token_ids):
    assert PromptLookup(3, Places(3), 1).propose(token_ids, 4) == []


@given(st.integers(1, 5000), st.floats(0.01, 0.99))
def test_guesses_are_fewer_the_more_sequences_run_and_the_worse_they_are(num_running, rate):
    speculation = Speculation(longest=8, num_alike=3, num_free=24)
    count = speculation.worthwhile(num_running, rate)
    assert 0 <= count <= 8
    assert count >= speculation.worthwhile(num_running + 1, rate)
    assert count >= speculation.worthwhile(num_running, rate * 0.9)
    # The last one is worth its time, and one more would not be.
    share = num_running / (num_running + 24)
    assert not count or rate**count >= share * 0.999
    assert count == 8 or rate ** (count + 1) <= share * 1.001


class Fixed:
    def propose(self, token_ids: list[int], count: int) -> list[int]:
        return [5, 6, 7, 8][:count]


def test_few_guesses_beside_many_sequences_do_not_pay():
    speculation, speculators = (
        Speculation(longest=4, num_alike=3, num_free=20),
        [Speculator(Fixed()) for _ in range(32)],
    )
    for speculator in speculators:
        speculator.guess([], 1)
    assert speculation.pays(32, speculators)
    assert speculation.pays(1, speculators[:1]) and speculation.pays(20, speculators[:12])
    assert not speculation.pays(32, speculators[:1]) and not speculation.pays(31, speculators[:2])


def test_what_is_drawn_behind_a_wrong_guess_is_lost():
    speculator = Speculator(Fixed())
    speculator.guess([], 4)
    assert speculator.guesses == [5, 6, 7, 8]
    assert speculator.verify(5) and not speculator.is_ahead
    assert not speculator.verify(9)
    assert (speculator.guesses, speculator.num_lost, speculator.is_ahead) == ([], 3, True)


def test_guesses_that_were_wrong_are_forgotten_in_time():
    speculator = Speculator(Fixed())
    usual = speculator.rate
    for _ in range(20):
        speculator.guess([], 1)
        speculator.verify(0)
    low = speculator.rate
    for _ in range(60):
        speculator.guess([], 0)
    assert low < 0.25 < usual * 0.99 < speculator.rate < usual
    for _ in range(20):
        speculator.guess([], 4)
        for token in (5, 6, 7, 8):
            speculator.verify(token)
    assert speculator.rate > 0.9


def likely(num_tokens: int, seed: int) -> list[int]:
    """A prompt behind which comes a token that it has: something to guess from."""
    for first in range(100):
        prompt = [(first * 11 + i * 3) % 50 for i in range(num_tokens)]
        if expected_tokens(prompt, 1, seed)[0] in prompt[:-1]:
            return prompt
    raise AssertionError("no such prompt")


@pytest.mark.parametrize("overlaps", [True, False])
def test_samples_fork_before_anything_is_guessed(overlaps):
    # The prompt's last token is a chunk by itself.
    settings = {"max_num_batched_tokens": 12, "num_speculative_tokens": 3, "prompt_lookup_min": 1}
    small = SmallEngine(overlaps=overlaps, **settings)
    prompt = [*[3, 4] * 12, 3]
    small.add(1, prompt, n=3, max_tokens=39, seed=1, prompt_logprobs=0)
    small.run()
    for index in range(3):
        assert small.tokens(1, index) == expected_tokens(prompt, 39, _seed_of_sample(1, index))
    assert small.scheduler.counters.drafted_tokens > small.scheduler.counters.accepted_tokens > 0


@pytest.mark.parametrize(("num_blocks", "block_size"), [(9, 2), (17, 1)])
def test_nobody_gives_way_for_guesses(num_blocks, block_size):
    """What the first would guess has no blocks, or would take the second's, until that has ended."""
    small = SmallEngine(
        num_blocks=num_blocks,
        block_size=block_size,
        num_speculative_tokens=3,
        prompt_lookup_min=1,
        enable_prefix_caching=False,
    )
    prompts = likely(7, 1), [9, 8, 7, 6, 5, 4, 3]
    small.add(1, prompts[0], max_tokens=8, seed=1)
    small.add(2, prompts[1], max_tokens=2, seed=1)
    small.run()
    assert small.tokens(1) == expected_tokens(prompts[0], 8, 1)
    assert small.tokens(2) == expected_tokens(prompts[1], 2, 1)
    assert small.scheduler.counters.preemptions == 0


def test_a_right_guess_saves_a_step():
    steps = []
    for num_guesses in (0, 3):
        small = SmallEngine(overlaps=False, num_speculative_tokens=num_guesses, prompt_lookup_min=1)
        small.add(1, [3, 4] * 5, max_tokens=30, seed=1, stream=True)
        small.run()
        assert small.tokens(1) == expected_tokens([3, 4] * 5, 30, 1)
        steps.append(small.scheduler.counters.steps)
    assert steps == [30, 30 - small.scheduler.counters.accepted_tokens] and steps[1] < 28


def test_an_answer_that_ends_amid_guesses_ends_there():
    expected = expected_tokens([3, 4] * 5, 30, 1)
    for at in range(1, 30):
        small = SmallEngine(overlaps=False, num_speculative_tokens=6, prompt_lookup_min=1)
        small.add(1, [3, 4] * 5, max_tokens=30, seed=1, stop_token_ids=(expected[at],))
        small.run()
        assert small.tokens(1) == expected[: expected.index(expected[at]) + 1], at
        assert small.reason(1) == ["stop"] and small.blocks.num_used == 0


def test_only_what_is_the_answers_can_be_found_again():
    """Blocks that a wrong guess has been written to are not those of the tokens in their place."""
    for seed in range(1, 41, 2):
        small = SmallEngine(overlaps=False, block_size=2, num_speculative_tokens=6, prompt_lookup_min=1)
        prompt = [3, 4] * 5
        answer = expected_tokens(prompt, 20, seed)
        for number, num_given in enumerate((0, 5, 10, 15, 19)):
            small.add(number, prompt + answer[:num_given], max_tokens=20 - num_given, seed=seed)
            small.run()
            assert small.tokens(number) == answer[num_given:], (seed, num_given)
        assert small.scheduler.counters.cached_tokens > 0


class Always(Speculation):
    def speculators(self, num_sequences: int, num_prompt: int) -> list[Speculator]:
        return [Speculator(Fixed()) for _ in range(num_sequences)]


@pytest.mark.parametrize("num_prompt", range(20, 36))
@pytest.mark.parametrize("waits", [True, False])
def test_guesses_take_only_what_those_before_them_leave(num_prompt, waits):
    """A prompt that goes before the one who guesses takes nearly all of the step, and others wait behind."""
    for num_steps in range(3, 9):
        small = SmallEngine(num_speculative_tokens=8)
        small.scheduler._speculation = Always(longest=8, num_alike=1, num_free=20)
        small.add(1, [3, 4] * 5, max_tokens=40, seed=1, priority=5)
        for _ in range(num_steps):
            small.step()
        small.add(2, [9] * num_prompt, max_tokens=5, seed=2, priority=0)
        if waits:
            small.add(3, [8] * 30, max_tokens=5, seed=2, priority=9)
        small.run()
        assert small.tokens(1) == expected_tokens([3, 4] * 5, 40, 1)


def test_who_waits_gets_his_turn_beside_those_who_guess():
    first = []
    for num_guesses in (0, 16):
        small = SmallEngine(
            max_model_len=400,
            num_blocks=200,
            num_speculative_tokens=num_guesses,
            prompt_lookup_min=1,
            overlaps=False,
        )
        small.add(1, [3, 4] * 5, max_tokens=300, seed=1)
        for _ in range(30):
            small.step()
        small.add(2, [9, 8, 7, 6], max_tokens=5, seed=2, stream=True)
        steps = small.scheduler.counters.steps
        small.run_until(lambda small=small: bool(small.tokens(2)))
        first.append(small.scheduler.counters.steps - steps)
    assert first == [1, 1]


def test_an_answer_and_its_guesses_come_in_one_output_a_step():
    small = SmallEngine(num_speculative_tokens=3, prompt_lookup_min=1)
    small.add(1, [3, 4] * 5, max_tokens=40, seed=1, stream=True)
    small.run()
    assert len(small.outputs) == small.scheduler.counters.steps < 38


def test_all_who_guess_run_in_each_step():
    """Also those who came while the others' step ran."""
    small = SmallEngine(overlaps=True, max_num_seqs=6, num_speculative_tokens=3, prompt_lookup_min=1)
    for number in range(6):
        small.add(number, [number * 7 + 1, 2, 3], max_tokens=20, seed=2)
        small.step()
    sizes = small.scheduler.observed.step_sequences
    sizes.clear()
    for _ in range(5):
        small.step()
    assert list(sizes) == [6] * 5


@given(st.integers(1, 64), st.integers(1, 9000), st.integers(1, 300))
def test_no_step_has_more_guesses_than_the_most(longest, budget, max_running):
    speculation = Speculation(longest, num_alike=3, num_free=20)
    most = speculation.most(budget, max_running) * max_running
    assert all(
        num_running * min(longest, speculation.room(budget, num_running)) <= most
        for num_running in range(1, max_running + 1)
    )


@pytest.mark.parametrize("num_blocks", range(16, 40, 3))
def test_who_is_preempted_guesses_anew(num_blocks):
    settings = {"num_speculative_tokens": 8, "prompt_lookup_min": 1, "max_num_batched_tokens": 64}
    small = SmallEngine(num_blocks=num_blocks, enable_prefix_caching=False, **settings)
    for number in range(4):
        small.add(number, [3 + number, 4] * 5, max_tokens=40, seed=1)
    small.run()
    for number in range(4):
        assert small.tokens(number) == expected_tokens([3 + number, 4] * 5, 40, 1)
    assert small.scheduler.counters.preemptions > 0
