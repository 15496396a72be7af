"""Several ranks against one, and against transformers: real processes that meet through torch.distributed.

Ranks add up their parts of a sum in another order than one rank does: log-probabilities differ in the last
digits, tokens of random float32 models do not.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import interpreted
import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import FAMILIES, SIZES, check_adapters, greedy, write_model
from pagetide.config import Settings, SettingsError
from pagetide.engine import ranks
from pagetide.engine.parent import environment_of_children
from pagetide.engine.ranks import RankError
from pagetide.folders import ranks_folder
from pagetide.llm import LLM, RequestOutput
from pagetide.models.config import DecoderConfig, UnsupportedModelError
from pagetide.models.sharding import make_shard
from pagetide.ops.layers import Affine, LayerWeights
from pagetide.ops.weights import DenseWeight, columns_of, quantize
from pagetide.types import EngineError, SamplingParams
from transformers import LlamaConfig, Phi3Config, PretrainedConfig

LARGER: dict[str, Any] = {
    **SIZES,
    "vocab_size": 517,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
CASES: dict[str, tuple[PretrainedConfig, int, dict[str, Any]]] = {
    "KV heads alike": (FAMILIES["llama-biases"], 2, {}),
    "KV heads uneven": (FAMILIES["smollm2"], 2, {}),
    "KV heads held twice": (LlamaConfig(**LARGER, attention_bias=True), 4, {}),
    "one query head each": (LlamaConfig(**{**LARGER, "num_attention_heads": 4}), 4, {"ops": "reference"}),
    "norms of heads": (FAMILIES["qwen3"], 2, {"ops": "reference"}),
    "windows": (FAMILIES["mistral-window"], 2, {}),
    "norms behind": (FAMILIES["gemma2"], 2, {}),
    "guesses": (FAMILIES["llama2"], 2, {"num_speculative_tokens": 3, "prompt_lookup_min": 1}),
    "one matrix for queries, keys and values": (FAMILIES["phi3"], 2, {}),
    "quantized": (LlamaConfig(**LARGER), 2, {"quantization": "w8a16"}),
    "kernels of a GPU": (FAMILIES["gemma3"], 2, {"ops": "triton"}),
    "KV cache in 8 bits": (LlamaConfig(**LARGER), 2, {"kv_cache_dtype": "int8"}),
}
PROMPTS = [[random.Random(index).randrange(6, 190) for _ in range(5 + 17 * index)] for index in range(6)]
PROMPTS.append(PROMPTS[5] + PROMPTS[1])  # a prefix that is cached by then


def run_all(folder: Path, size: int, **settings: Any) -> list[RequestOutput]:
    """Requests of every kind, with little room for their KV cache."""
    llm = LLM(
        str(folder),
        device="cpu",
        dtype="float32",
        tensor_parallel_size=size,
        num_blocks=40,
        max_num_seqs=4,
        max_num_batched_tokens=48,
        check_integrity=True,
        **settings,
    )
    is_slow = settings.get("ops") == "triton"  # a kernel's interpreter
    prompts, count = (PROMPTS[:2], 3) if is_slow else (PROMPTS, 12)
    plain = SamplingParams(temperature=0, max_tokens=2 * count, ignore_eos=True, logprobs=2)
    try:
        answers = llm.generate(prompts, plain)
        answers += llm.generate(
            PROMPTS[:4],
            [
                SamplingParams(temperature=0.9, seed=7, n=3, max_tokens=count, top_p=0.9),
                SamplingParams(temperature=0, max_tokens=count, beam_width=2, n=2),
                SamplingParams(temperature=1.0, seed=1, max_tokens=count, allowed_token_ids=tuple(range(60))),
                SamplingParams(
                    temperature=0.7,
                    seed=3,
                    max_tokens=count,
                    repetition_penalty=1.3,
                    logit_bias={17: 2.0},
                    prompt_logprobs=1,
                ),
            ],
        )
    finally:
        llm.close()
    return answers


@pytest.mark.parametrize("name", CASES)
def test_ranks_answer_as_one(name, tmp_path):
    config, size, settings = CASES[name]
    if settings.get("ops") == "triton" and interpreted.HAS_GPU:
        pytest.skip("a GPU's kernels are interpreted only where there is no GPU")
    write_model(tmp_path, config)
    alone, together = (run_all(tmp_path, ranks, **settings) for ranks in (1, size))
    for one, other in zip(alone, together, strict=True):
        for first, second in zip(one.outputs, other.outputs, strict=True):
            assert first.token_ids == second.token_ids
            assert [s.logprob for s in first.logprobs] == pytest.approx(
                [s.logprob for s in second.logprobs], abs=1e-3
            )


def test_ranks_answer_as_transformers(tmp_path):
    reference = write_model(tmp_path, CASES["KV heads held twice"][0])
    llm = LLM(str(tmp_path), device="cpu", dtype="float32", tensor_parallel_size=2, num_blocks=40)
    answers = llm.generate(PROMPTS[:3], SamplingParams(temperature=0, max_tokens=16))
    llm.close()
    for prompt, answer in zip(PROMPTS, answers, strict=False):
        assert answer.outputs[0].token_ids == greedy(reference, prompt, 16)


ONE_ENGINE = """
import json, os, sys
from pagetide import LLM, SamplingParams
llm = LLM(**json.loads(sys.argv[1]))
answer = llm.generate([[7, 8, 9]], SamplingParams(temperature=0, max_tokens=6))[0].outputs[0]
print(answer.token_ids, flush=True)
os._exit(0)
"""


@pytest.mark.parametrize("name", ["KV heads uneven", "one matrix for queries, keys and values"])
def test_adapters_equal_pefts_on_two_ranks(name, tmp_path):
    config, size, _ = CASES[name]
    check_adapters(
        tmp_path, "phi" if isinstance(config, Phi3Config) else "llama", config, 9, device="cpu",
        tensor_parallel_size=size, num_blocks=40, max_model_len=120, max_loras=2,
    )  # fmt: skip


def test_two_machines_meet_at_a_port(tmp_path):
    """The other machine's ranks join whichever engine is there, and do as that one's settings say; the first
    one ends without a word.
    """
    reference = write_model(tmp_path / "model", FAMILIES["llama2"])
    settings = {
        "model": str(tmp_path / "model"),
        "device": "cpu",
        "dtype": "float32",
        "num_blocks": 40,
        "tensor_parallel_size": 2,
        "ranks_per_node": 1,
        "rendezvous": f"127.0.0.1:{free_port()}",
        "engine_start_timeout_s": 600.0,
    }
    file = tmp_path / "pagetide.json"
    file.write_text(json.dumps({**settings, "dtype": "bfloat16", "num_blocks": 9, "block_size": 48}))
    environment = environment_of_children()
    join = [sys.executable, "-m", "pagetide.engine.node", "1", str(file)]
    joiner = subprocess.Popen(join, env=environment)
    try:
        for _ in range(2):
            engine = [sys.executable, "-c", ONE_ENGINE, json.dumps(settings)]
            said = subprocess.run(engine, env=environment, stdout=subprocess.PIPE, check=True, timeout=600)
            assert json.loads(said.stdout) == greedy(reference, [7, 8, 9], 6)
    finally:
        joiner.terminate()
        joiner.wait(120)
    assert joiner.returncode == 0
    assert processes_of(tmp_path) == []


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def processes_of(folder: Path) -> list[int]:
    """Ranks other than 0 of the model in this folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                command = (entry / "cmdline").read_bytes()
                if b"pagetide.engine.rank" in command and str(folder).encode() in command:
                    found.append(int(entry.name))
    return found


def test_a_dead_rank_ends_the_step_and_leaves_nothing(tmp_path):
    write_model(tmp_path, FAMILIES["llama2"])

    def start() -> contextlib.closing[LLM]:
        return contextlib.closing(
            LLM(str(tmp_path), device="cpu", dtype="float32", tensor_parallel_size=2, num_blocks=40)
        )

    with start() as llm:
        (rank,) = processes_of(tmp_path)
        os.kill(rank, signal.SIGKILL)
        with pytest.raises(RuntimeError):
            llm.generate([PROMPTS[0]], SamplingParams(max_tokens=4))
        with pytest.raises(EngineError, match="failed in an earlier step"):
            llm.generate([PROMPTS[0]], SamplingParams(max_tokens=4))
    assert processes_of(tmp_path) == []
    with start() as llm:
        assert llm.generate([PROMPTS[0]], SamplingParams(max_tokens=4))[0].outputs[0].token_ids


@pytest.mark.parametrize("when", ["forward", "sample", "wait"])
def test_the_error_of_a_step_is_the_one_that_is_told(when, tmp_path):
    """Whether the device fails at once or when it is waited for: what ends the requests must not hide why."""
    write_model(tmp_path, FAMILIES["llama2"])
    with contextlib.closing(LLM(str(tmp_path), device="cpu", dtype="float32", num_blocks=40)) as llm:
        runner = llm.engine.runner

        def fails(*_: object) -> None:
            raise RuntimeError("the device is gone")

        setattr(runner, {"forward": "_forward", "sample": "_sample", "wait": "finish"}[when], fails)
        with pytest.raises(RuntimeError, match="the device is gone"):
            llm.generate(PROMPTS, SamplingParams(max_tokens=4))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"tensor_parallel_size": 4}, "possible are 1, 2"),
        ({"tensor_parallel_size": 2, "max_model_len": 9999}, "max_model_len is 9999"),
        ({"tensor_parallel_size": 2, "ranks_per_node": 1}, "rendezvous must say where"),
        ({"tensor_parallel_size": 2, "ranks_per_node": 3}, "must be a multiple"),
        ({"tensor_parallel_size": 2, "ranks_per_node": 1, "rendezvous": "here"}, "must be host:port"),
    ],
)
def test_what_cannot_be_is_refused(settings, says, tmp_path):
    write_model(tmp_path, FAMILIES["llama2"])
    with pytest.raises((SettingsError, UnsupportedModelError), match=says):
        LLM(str(tmp_path), device="cpu", dtype="float32", num_blocks=40, **settings)
    assert processes_of(tmp_path) == []


def test_a_rank_that_cannot_start_says_why(tmp_path, monkeypatch):
    write_model(tmp_path, FAMILIES["llama2"])
    started = ranks.start_rank

    def with_other_settings(settings: Settings, rank: int, address: str) -> subprocess.Popen[bytes]:
        return started(msgspec.structs.replace(settings, model="/nowhere"), rank, address)

    monkeypatch.setattr(ranks, "start_rank", with_other_settings)
    with pytest.raises(RankError, match=r"rank 1: .*nowhere"):
        LLM(str(tmp_path), device="cpu", dtype="float32", num_blocks=40, tensor_parallel_size=2)


def sizes() -> st.SearchStrategy[tuple[DecoderConfig, int]]:
    """Shapes of models, and a number of ranks that fits them or not."""

    def make(kept: int, group: int, units: int, vocab_size: int) -> DecoderConfig:
        return DecoderConfig(
            vocab_size=vocab_size,
            hidden_size=64,
            intermediate_size=16 * units,
            num_layers=1,
            num_heads=kept * group,
            num_kv_heads=kept,
            head_dim=16,
            max_position=64,
            norm_eps=1e-5,
            ropes=(),
            rope_of_layer=(),
            windows=(0,),
            tie_embeddings=False,
            qk_norm=False,
            end_ids=frozenset(),
            pad_id=0,
        )

    configs = st.builds(make, st.integers(1, 6), st.integers(1, 6), st.integers(1, 30), st.integers(10, 400))
    return st.tuples(configs, st.integers(2, 9))


@given(sizes())
def test_parts_are_the_whole(case):
    config, size = case
    try:
        shards = [make_shard(config, rank, size) for rank in range(size)]
    except UnsupportedModelError:
        return
    assert [head for shard in shards for head in shard.query_heads] == list(range(config.num_heads))
    for name, total in (("intermediate", config.intermediate_size), ("vocabulary", config.vocab_size)):
        assert [item for shard in shards for item in getattr(shard, name)] == list(range(total))
        assert all(len(getattr(shard, name)) for shard in shards)
    group = config.num_heads // config.num_kv_heads
    for shard in shards:
        own = shard.config
        for index, head in enumerate(shard.query_heads):
            assert shard.kv_heads[index // (own.num_heads // own.num_kv_heads)] == head // group


@given(sizes(), st.sampled_from([None, 8, 4]))
def test_parts_add_up_to_the_layer(case, bits):
    """Without attention and activations, which see one head, or one unit of width, at a time."""
    config, size = case
    try:
        shards = [make_shard(config, rank, size) for rank in range(size)]
    except UnsupportedModelError:
        return
    layer = whole_layer(config, bits)
    x = torch.randn(3, config.hidden_size, dtype=torch.float64)
    group, head_dim = config.num_heads // config.num_kv_heads, config.head_dim
    expected_values = heads(apply(layer.qkv, x), config)[2].repeat_interleave(group, 1)
    expected = apply(layer.out, expected_values.flatten(1)), apply(layer.down, gated(apply(layer.gate_up, x)))
    found = [torch.zeros_like(x) for _ in expected]
    for shard in shards:
        part, own = shard.layer(layer), shard.config
        values = heads(apply(part.qkv, x), own)[2].repeat_interleave(own.num_heads // own.num_kv_heads, 1)
        assert values.shape[2] == head_dim
        found[0] += apply(part.out, values.flatten(1))
        found[1] += apply(part.down, gated(apply(part.gate_up, x)))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def whole_layer(config: DecoderConfig, bits: int | None) -> LayerWeights:
    def affine(outputs: int, inputs: int) -> Affine:
        values = torch.randn(outputs, inputs)
        return Affine(quantize(values, bits) if bits else DenseWeight(values), torch.randn(outputs))

    attended = config.num_heads * config.head_dim
    norm = torch.ones(config.hidden_size)
    return LayerWeights(
        attention_norm=norm,
        qkv=affine(attended + 2 * config.num_kv_heads * config.head_dim, config.hidden_size),
        q_norm=None,
        k_norm=None,
        window=0,
        out=affine(config.hidden_size, attended),
        mlp_norm=norm,
        gate_up=affine(2 * config.intermediate_size, config.hidden_size),
        down=affine(config.hidden_size, config.intermediate_size),
    )


def apply(affine: Affine, x: torch.Tensor) -> torch.Tensor:
    result = x @ affine.weight.dense().double().T
    return result if affine.bias is None else result + affine.bias


def heads(qkv: torch.Tensor, config: DecoderConfig) -> tuple[torch.Tensor, ...]:
    return qkv.unflatten(1, (-1, config.head_dim)).split(
        [config.num_heads, config.num_kv_heads, config.num_kv_heads], 1
    )


def gated(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, 1)
    return gate * up


@given(st.integers(0, 5), st.integers(1, 6), st.sampled_from([16, 32]))
def test_columns_of_codes(first, count, unit):
    weight = quantize(torch.randn(5, 32 * 12), 4)
    part = range(first * unit, (first + count) * unit)
    assert torch.equal(columns_of(weight, part).dense(), weight.dense()[:, part.start : part.stop])


def test_codes_are_not_cut_inside_a_group():
    with pytest.raises(ValueError, match="no whole groups"):
        columns_of(quantize(torch.randn(5, 64), 8), range(8, 24))


def test_a_failed_start_leaves_room_for_the_next(tmp_path):
    write_model(tmp_path, FAMILIES["llama2"])
    for _ in range(2):
        with pytest.raises(SettingsError, match="swap_space_gb"):
            LLM(str(tmp_path), device="cpu", dtype="float32", tensor_parallel_size=2, swap_space_gb=1)
    assert not ranks_folder(os.getpid()).exists()


def test_the_first_reason_is_told_unless_a_rank_was_killed(tmp_path, monkeypatch):
    """Others then see a connection end, which only follows."""
    config = LlamaConfig(**{**LARGER, "num_key_value_heads": 4})
    write_model(tmp_path, config)
    started = ranks.start_rank

    def start(settings: Settings, rank: int, address: str) -> subprocess.Popen[bytes]:
        process = started(settings, rank, address)
        if rank == 2:
            process.kill()
        return process

    monkeypatch.setattr(ranks, "start_rank", start)
    with pytest.raises(RankError, match=r"rank 2 has ended \(signal 9\)"):
        LLM(str(tmp_path), device="cpu", dtype="float32", num_blocks=40, tensor_parallel_size=4)
