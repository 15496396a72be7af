"""The real model through the real server, in float32, against transformers token by token."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from client import CACHE, Streams, metric, wait_until_idle
from pagetide.llm import LLM
from pagetide.models.source import find_model
from pagetide.types import SamplingParams
from transformers import AutoModelForCausalLM

NUM_TOKENS = 16


@pytest.fixture(scope="module")
def reference() -> Iterator[Any]:
    # torch's threads wait for each other at every layer: on a machine with other work one alone is many
    # times as fast.
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield AutoModelForCausalLM.from_pretrained(str(find_model("", Path(CACHE))), dtype=torch.float32).eval()
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """32 prompts of 1 to 1,500 tokens; some begin alike."""
    chooser = random.Random(0)
    lengths = [1, 2, 15, 16, 17, 31, 100, 255, 256, 257, 511, 700, 1000, 1500] + [
        chooser.randint(3, 600) for _ in range(14)
    ]
    made = [chooser.choices(range(100, 40_000), k=k) for k in lengths]
    made += [made[11][:640] + chooser.choices(range(100, 40_000), k=9) for _ in range(4)]
    return made


@pytest.fixture(scope="module")
def expected(reference, prompts) -> list[list[int]]:
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = reference.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=NUM_TOKENS,
                pad_token_id=0,
            )
        answers.append(out[0, len(prompt) :].tolist())
    return answers


@pytest.mark.parametrize("stream", [True, False])
def test_concurrent_prompts_equal_transformers_with_preemption_and_prefix_hits(
    real, prompts, expected, stream
):
    assert sum(len(p) + NUM_TOKENS for p in prompts) > 600 * 16, (
        "the prompts must not fit into the server's blocks at once"
    )
    cached = metric(real, "pagetide_cached_prompt_tokens")
    streams = Streams(real)
    sent = [
        streams.send("ensemble", f"p{i}", input_ids=p, max_tokens=NUM_TOKENS, temperature=0.0, stream=stream)
        for i, p in enumerate(prompts)
    ]
    for one, tokens in zip(sent, expected, strict=True):
        assert one.done.wait(120) and not streams.errors
        assert one.ids() == tokens
        assert one.reason == ("length" if len(tokens) == NUM_TOKENS and tokens[-1] != 2 else "stop")
    streams.close()
    wait_until_idle(real)
    assert metric(real, "pagetide_cached_prompt_tokens") > cached


def test_long_answers_equal_transformers_although_sequences_are_preempted(real, reference):
    """24 sequences that outgrow the cache while they run."""
    chooser = random.Random(5)
    prompts = [chooser.choices(range(100, 40_000), k=390) for _ in range(24)]
    preempted = metric(real, "pagetide_preemptions")
    streams = Streams(real)
    sent = [
        streams.send("ensemble", f"l{i}", input_ids=p, max_tokens=60, temperature=0.0, ignore_eos=True)
        for i, p in enumerate(prompts)
    ]
    assert all(one.done.wait(200) for one in sent) and not streams.errors
    streams.close()
    wait_until_idle(real)
    assert metric(real, "pagetide_preemptions") > preempted
    for one, prompt in list(zip(sent, prompts, strict=True))[::6]:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = reference.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=60,
                min_new_tokens=60,
                pad_token_id=0,
            )
        assert one.ids() == out[0, 390:].tolist()


TOPICS = [
    "the sea",
    "the moon",
    "bread",
    "a small town",
    "winter",
    "trains",
    "music",
    "gardens",
    "bridges",
    "tea",
    "paper",
    "rivers",
]


def test_bfloat16_agrees_for_nearly_all_prompts_and_its_log_probabilities_are_near(reference):
    engine = LLM(dtype="bfloat16", cache_dir=CACHE, max_model_len=2048)
    tokenizer = engine.get_tokenizer()
    chats = [[{"role": "user", "content": f"Tell me something about {topic}."}] for topic in TOPICS]
    prompts = [
        tokenizer(tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True)).input_ids
        for c in chats
    ]
    results = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True))
    num_equal = 0
    for prompt, result in zip(prompts, results, strict=True):
        tokens = result.outputs[0].token_ids
        with torch.inference_mode():
            logits = (
                reference(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            )
        # What the engine chose is, for the float32 reference, the likeliest token or nearly as likely.
        gaps = logits.max(-1).values - logits.gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1)
        assert gaps.max() < 0.25
        num_equal += int((gaps == 0).sum())
    assert num_equal >= 0.95 * NUM_TOKENS * len(prompts)
    engine.close()
