from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from client import Streams, start, wait_until_idle
from gateway import Gateway
from parrot import TEXT, pieces_of, write_parrot
from triton_server import TritonServer


@pytest.fixture(autouse=True)
def no_stream_outlives_its_test(request) -> Iterator[None]:
    """A test that fails leaves nothing running that others would feel.

    Streams of fixtures of a wider scope stay.
    """
    before = set(Streams.unclosed)
    yield
    for streams in Streams.unclosed - before:
        streams.close(cancel=True)


@pytest.fixture(scope="session")
def adapters(tmp_path_factory) -> Path:
    """The folder of the real server's LoRA adapters; it is empty when the server starts."""
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="session")
def real(adapters) -> Iterator[TritonServer]:
    """The real model in float32, with so few blocks that the tests' prompts do not fit at once."""
    server = start(
        {
            "dtype": "float32",
            "num_blocks": 600,
            "max_model_len": 2048,
            "max_num_batched_tokens": 256,
            "allow_logits": True,
            "metric_names": "vllm",
            "lora_dir": str(adapters),
            "max_loras": 2,
        }
    )
    yield server
    wait_until_idle(server)
    assert server.stop(), "the server did not stop by itself within its time-out"


@pytest.fixture(scope="session")
def parrot(tmp_path_factory) -> Iterator[TritonServer]:
    """A model that says TEXT again and again."""
    folder: Path = tmp_path_factory.mktemp("parrot")
    write_parrot(folder, pieces_of(TEXT, 2), ends=False)
    # Few blocks, since all of them are checked after every step.
    server = start({"model": str(folder), "max_num_seqs": 64, "max_queued_requests": 200, "num_blocks": 4000})
    yield server
    wait_until_idle(server)
    assert server.stop(), "the server did not stop by itself within its time-out"


@pytest.fixture(scope="module")
def gateway(real) -> Iterator[Gateway]:
    gateway = Gateway(real)
    yield gateway
    gateway.stop()


@pytest.fixture(scope="module")
def client(gateway) -> openai.OpenAI:
    return gateway.client()
