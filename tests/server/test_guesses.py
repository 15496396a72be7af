"""Speculative decoding through the real server: its answers are the same, and it tells of its guesses."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from client import CACHE, metric, start, stream_one, wait_for, wait_until_idle
from pagetide.llm import LLM
from pagetide.types import SamplingParams
from triton_server import TritonServer

QUOTE = "The quick brown fox jumps over the lazy dog, and the lazy dog sleeps while the brown fox runs away."
PROMPT = f"Repeat this three times, word for word: {QUOTE}\n\n{QUOTE}\n\nThe quick"
METRICS = ("pagetide_draft_tokens", "pagetide_accepted_draft_tokens")
NUM_TOKENS = 60


@pytest.fixture(scope="module")
def guessing() -> Iterator[TritonServer]:
    server = start({"cache_dir": CACHE, "num_blocks": 200, "num_speculative_tokens": 5})
    yield server
    wait_until_idle(server)
    assert server.stop()


def test_an_answer_comes_in_fewer_steps_and_tells_of_its_guesses(guessing):
    stream = stream_one(
        guessing, text_input=PROMPT, max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True, stream=True,
        return_perf_metrics=True,
    )  # fmt: skip
    llm = LLM("", cache_dir=CACHE, num_blocks=200)
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    expected = llm.generate([PROMPT], params)[0].outputs[0]
    llm.close()
    assert (stream.ids(), stream.text) == (expected.token_ids, expected.text)
    last = stream.responses[-1]
    drafted, accepted = last["total_draft_tokens"], last["total_accepted_draft_tokens"]
    assert drafted >= accepted > NUM_TOKENS / 4
    assert last["acceptance_rate"] == pytest.approx(accepted / drafted)
    wait_for(
        lambda: [metric(guessing, name) for name in METRICS] == [drafted, accepted],
        what="the metrics of these guesses",
    )
