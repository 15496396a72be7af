"""What speculative decoding is worth: the same requests with and without it, in turns."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engines import CACHE
from workloads import MAX_RUNNING

NUM_GUESSES = 6
SIZES = (1, 4, 16, 32)  # sequences at the same time
QUESTIONS = (
    "Why does the tide rise?",
    "Write a short letter to a friend about a journey by train.",
    "What is the difference between a list and a tuple in Python?",
    "Explain how bread is made.",
)
TEXT = Path(__file__).with_name("quality.txt")


@dataclass
class Case:
    """Of one kind of text and number of sequences, for each turn: how many times as fast it was with guesses;
    and of all turns, the share of guesses that were right, and of tokens that were guessed rightly.
    """

    text: str
    sequences: int
    ratios: list[float] = field(default_factory=list)
    right: float = 0.0
    saved: float = 0.0


def _prompts(tokenizer: Any, text: str) -> Iterator[list[int]]:
    """`quotes`: a passage, and the same passage begun again. `answers`: questions to a chat model."""
    if text == "quotes":
        passages = [p for p in TEXT.read_text().split("\n\n") if len(p) > 150]
        for number, passage in enumerate(itertools.cycle(passages)):
            begun = " ".join(passage.split()[: 4 + number // len(passages)])
            yield tokenizer(f"{passage}\n\nThe same once more:\n\n{begun}")["input_ids"]
    for number in itertools.count():
        question = QUESTIONS[number % len(QUESTIONS)]
        messages = [{"role": "user", "content": f"{question} ({number // len(QUESTIONS) + 1})"}]
        yield tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def measure(repeats: int, num_tokens: int = 96) -> list[Case]:
    from pagetide.llm import LLM
    from pagetide.types import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    settings: dict[str, Any] = {"cache_dir": CACHE, "max_num_seqs": MAX_RUNNING}
    cases = [Case(text, size) for text in ("quotes", "answers") for size in SIZES]
    with (
        closing(LLM(**settings)) as plain,
        closing(LLM(**settings, num_speculative_tokens=NUM_GUESSES)) as guessing,
    ):
        prompts = {
            case.text: list(itertools.islice(_prompts(plain.get_tokenizer(), case.text), 32))
            for case in cases
        }

        def seconds(llm: LLM, case: Case) -> float:
            begin = time.perf_counter()
            llm.generate(prompts[case.text][: case.sequences], params)
            return time.perf_counter() - begin

        for case in cases:
            for llm in (plain, guessing):
                seconds(llm, case)  # from here on all prompts are in the cache
            before = guessing.engine.statistics().counters
            for _ in range(repeats):
                case.ratios.append(seconds(plain, case) / seconds(guessing, case))
            after = guessing.engine.statistics().counters
            drafted, accepted, generated = (
                after[name] - before[name]
                for name in ("drafted_tokens", "accepted_tokens", "generated_tokens")
            )
            case.right, case.saved = accepted / max(drafted, 1), accepted / generated
    return cases


def table(cases: list[Case]) -> str:
    lines = [
        "| text | sequences | tokens/s against no guesses | right guesses | tokens that came by them |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {case.text} | {case.sequences} | {statistics.median(case.ratios):.2f} | {case.right:.0%} "
        f"| {case.saved:.0%} |"
        for case in cases
    ]
    return "\n".join(lines)
