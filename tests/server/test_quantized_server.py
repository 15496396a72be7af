"""The embedded model through the real server with its file's own codes and a cache of integers."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from client import CACHE, Streams, metric, start, stream_one, wait_until_idle
from pagetide.llm import LLM
from pagetide.types import SamplingParams
from triton_server import TritonServer

SETTINGS = {"quantization": "w4a8", "kv_cache_dtype": "int8", "cache_dir": CACHE, "dtype": "float32"}


@pytest.fixture(scope="module")
def quantized() -> Iterator[TritonServer]:
    server = start({**SETTINGS, "num_blocks": 60})
    yield server
    wait_until_idle(server)
    assert server.stop()


def test_answers_are_those_of_the_engine_alone(quantized):
    """Together, preempted, with shared beginnings: what each prompt gives by itself."""
    chooser = random.Random(3)
    prompts = [chooser.choices(range(100, 40_000), k=k) for k in (1, 15, 16, 17, 100, 255, 300, 511)]
    prompts += [prompts[-1][:400] + chooser.choices(range(100, 40_000), k=9) for _ in range(4)]
    llm = LLM("", **SETTINGS, num_blocks=60)
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    alone = [llm.generate([prompt], params)[0].outputs[0].token_ids for prompt in prompts]
    llm.close()
    before = metric(quantized, "pagetide_preemptions")
    streams = Streams(quantized)
    sent = [
        streams.send("ensemble", f"q{i}", input_ids=p, max_tokens=40, temperature=0.0, ignore_eos=True)
        for i, p in enumerate(prompts)
    ]
    assert all(one.done.wait(120) for one in sent) and not streams.errors
    streams.close()
    wait_until_idle(quantized)
    assert metric(quantized, "pagetide_preemptions") > before
    # Sums in floats may have another order in a batch of another size, which can decide between two tokens.
    same = sum(one.ids() == tokens for one, tokens in zip(sent, alone, strict=True))
    assert same >= len(prompts) - 2


def test_it_speaks(quantized):
    answer = stream_one(
        quantized, "ensemble", text_input="The capital of France is", max_tokens=12, temperature=0.0
    )
    assert "Paris" in answer.text
