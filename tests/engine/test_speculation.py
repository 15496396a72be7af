"""Speculative decoding on the embedded model: no answer is another than without it, to the last bit, and
steps are fewer where an answer repeats what was said.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
from pagetide.llm import LLM, RequestOutput
from pagetide.types import Guide, SamplingParams

QUOTE = "The quick brown fox jumps over the lazy dog, and the lazy dog sleeps while the brown fox runs away."
PROMPTS = [f"Repeat this three times, word for word: {QUOTE}\n\n{QUOTE}\n\nThe quick", "What is a tide?"]
GUESSED: dict[str, SamplingParams] = {
    "greedy": SamplingParams(temperature=0, max_tokens=60, ignore_eos=True),
    "with noise": SamplingParams(temperature=0.6, seed=7, max_tokens=60, ignore_eos=True),
    "samples, with all rules": SamplingParams(
        temperature=0.5, top_k=30, top_p=0.9, min_p=0.01, seed=3, n=3, max_tokens=40, ignore_eos=True
    ),
    "log-probabilities": SamplingParams(
        temperature=0, logprobs=3, prompt_logprobs=1, max_tokens=30, ignore_eos=True
    ),
    "penalties": SamplingParams(
        temperature=0, presence_penalty=0.2, frequency_penalty=0.1, max_tokens=40, ignore_eos=True
    ),
    "the best of several": SamplingParams(
        temperature=0.5, seed=1, n=1, best_of=3, max_tokens=20, ignore_eos=True
    ),
    "rules for single tokens": SamplingParams(
        temperature=0, logit_bias={17: 2.0}, bad_words=("lazy dog sleeps",), min_tokens=9, max_tokens=40
    ),
    "a stop text amid guesses": SamplingParams(temperature=0, stop=("sleeps wh",), max_tokens=60),
    "few tokens": SamplingParams(temperature=0, max_tokens=2, ignore_eos=True),
}
NOT_GUESSED: dict[str, SamplingParams] = {
    "beams": SamplingParams(temperature=0, beam_width=2, n=2, max_tokens=12, ignore_eos=True),
    "a grammar": SamplingParams(temperature=0, max_tokens=20, guide=Guide("regex", "The quick [a-z ]{9,60}")),
}


@pytest.fixture(scope="module")
def engines() -> Iterator[tuple[LLM, LLM]]:
    """Without guesses and with them; neither has much room for its KV cache."""
    settings: dict[str, Any] = {"num_blocks": 60, "max_num_seqs": 6, "check_integrity": True}
    with (
        contextlib.closing(LLM(**settings)) as plain,
        contextlib.closing(LLM(**settings, num_speculative_tokens=6)) as guessing,
    ):
        yield plain, guessing


def told(answers: list[RequestOutput]) -> list[Any]:
    return [
        (one.token_ids, one.text, one.finish_reason, one.logprobs, answer.prompt_logprobs)
        for answer in answers
        for one in answer.outputs
    ]


def counts(engine: LLM) -> tuple[int, int, int]:
    counters = engine.engine.statistics().counters
    return counters["steps"], counters["drafted_tokens"], counters["accepted_tokens"]


@pytest.mark.parametrize("name", GUESSED)
def test_answers_are_those_without_guesses(name, engines):
    plain, guessing = engines
    before = counts(guessing)
    assert told(guessing.generate(PROMPTS, GUESSED[name])) == told(plain.generate(PROMPTS, GUESSED[name]))
    steps, drafted, accepted = (now - then for now, then in zip(counts(guessing), before, strict=True))
    if name in ("greedy", "log-probabilities"):
        assert drafted >= accepted > steps / 4, "the model repeats what it read"


@pytest.mark.parametrize("name", NOT_GUESSED)
def test_what_the_host_decides_token_by_token_is_not_guessed(name, engines):
    plain, guessing = engines
    before = counts(guessing)
    params = NOT_GUESSED[name]
    assert told(guessing.generate(PROMPTS, params)) == told(plain.generate(PROMPTS, params))
    assert counts(guessing)[1:] == before[1:]


def test_all_of_them_together(engines):
    """In one batch, which preempts."""
    params = [*GUESSED.values(), *NOT_GUESSED.values()]
    prompts = [PROMPTS[0]] * len(params)
    answers = [engine.generate(prompts, params) for engine in engines]
    assert told(answers[1]) == told(answers[0])


def test_none_are_made_unless_asked_for(engines):
    assert counts(engines[0])[1] == 0
