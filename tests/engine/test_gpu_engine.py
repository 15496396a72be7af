"""The whole engine on the GPU's kernels: without a GPU in the Triton language's interpreter, with a device
that records steps by keeping what they would launch.
"""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from interpreted import DEVICE
from models import FAMILIES, check_adapters, greedy, write_model
from pagetide.config import SettingsError, make_settings
from pagetide.llm import LLM
from pagetide.models.config import UnsupportedModelError
from pagetide.runner import graphs as graphs_module
from pagetide.runner.device import CpuDevice, CudaDevice
from pagetide.runner.graphs import graph_sizes
from pagetide.runner.runner import Runner, warm_up_plan
from pagetide.types import SamplingParams
from safetensors.torch import load_file, save_file
from transformers import PretrainedConfig

SIZES: dict[str, Any] = {
    "ops": "triton",
    "dtype": "float32",
    "num_blocks": 40,
    "max_model_len": 120,
    "max_num_batched_tokens": 40,
    "max_num_seqs": 6,
    "check_integrity": True,
}


class RecordingCpu(CpuDevice):
    """Replays by calling again what was recorded; results lie in the same memory each time, as a graph's."""

    records = True
    recorded = 0
    replayed = 0

    def record(self, function):
        function()
        result = function()
        RecordingCpu.recorded += 1

        def replay():
            RecordingCpu.replayed += 1
            result.copy_(function())

        return replay, result

    def host_cache_bytes(self, settings):
        return int(settings.swap_space_gb * 2**30)


def small(name: str) -> PretrainedConfig:
    """The family with fewer layers and heads: the interpreter takes milliseconds for each program."""
    fields = {key: value for key, value in FAMILIES[name].to_dict().items() if key != "layer_types"}
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    return type(FAMILIES[name])(**{**fields, **sizes})


@pytest.fixture
def recorder(monkeypatch):
    """The device that a machine without a GPU has, recording; sizes are few."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr("pagetide.runner.device.CpuDevice", RecordingCpu)
    monkeypatch.setattr(graphs_module, "graph_sizes", lambda largest: [1, 4, largest])
    RecordingCpu.recorded = RecordingCpu.replayed = 0
    return RecordingCpu


def prompts() -> list[list[int]]:
    chooser = random.Random(1)
    found = [chooser.choices(range(6, 199), k=k) for k in (1, 3, 17, 50, 33)]
    return [*found, [*found[3][:40], 7, 8]]


@pytest.mark.parametrize("name", ["qwen3", "gemma2"])
def test_greedy_tokens_equal_transformers(name, recorder, tmp_path):
    model = write_model(tmp_path, small(name))
    engine = LLM(str(tmp_path), device=DEVICE.type, cache_dir=str(tmp_path / "cache"), **SIZES)
    results = engine.generate(prompts(), SamplingParams(temperature=0, max_tokens=9))
    for prompt, result in zip(prompts(), results, strict=True):
        assert result.outputs[0].token_ids == greedy(model, prompt, 9)
    if DEVICE.type == "cpu":
        assert recorder.recorded == 2 * 3 and recorder.replayed > 3, "with sampling and without, of each size"
    engine.close()


def test_adapters_equal_pefts(recorder, tmp_path):
    """In recorded steps too, which do the same work whoever has which."""
    settings = {name: SIZES[name] for name in ("ops", "num_blocks", "max_model_len", "max_num_seqs")}
    check_adapters(tmp_path, "llama2", small("llama2"), 5, device=DEVICE.type, **settings)
    assert DEVICE.type != "cpu" or recorder.replayed > 3


@pytest.mark.parametrize(("num_guesses", "largest"), [(0, (6, 6)), (3, (12, 12))])
def test_the_largest_steps_are_tried_before_the_cache_takes_what_is_left(
    num_guesses, largest, recorder, monkeypatch, tmp_path
):
    tried, forward = [], Runner._forward

    def note(runner, plan):
        tried.append((plan.num_tokens, plan.num_sampled))
        forward(runner, plan)

    def kv_cache_bytes(device, settings, try_steps):
        with monkeypatch.context() as noting:
            noting.setattr(Runner, "_forward", note)
            try_steps()
        return 2**16

    kind = recorder if DEVICE.type == "cpu" else CudaDevice
    monkeypatch.setattr(kind, "kv_cache_bytes", kv_cache_bytes)
    model = write_model(tmp_path, small("qwen3"))
    sizes = {**SIZES, "num_blocks": 0, "max_num_seqs": 6, "max_num_batched_tokens": 20}
    sizes["num_speculative_tokens"] = num_guesses
    engine = LLM(str(tmp_path), device=DEVICE.type, cache_dir=str(tmp_path / "cache"), **sizes)
    assert (20, 1) in tried and largest in tried
    assert engine.generate([[7, 8]], SamplingParams(temperature=0, max_tokens=5))[0].outputs[0].token_ids == (
        greedy(model, [7, 8], 5)
    )
    engine.close()


class Memory:
    """A GPU's, in bytes: 100, of which the weights have 30; a step takes `step` for a while, and leaves 5 to
    libraries.
    """

    def __init__(self, step):
        self.step, self.allocated, self.peak = step, 30, 90

    def try_steps(self):
        if self.allocated + self.step > 100:
            raise torch.OutOfMemoryError
        self.allocated += 5
        self.peak = max(self.peak, self.allocated + self.step)

    def reset_peak_memory_stats(self, device):
        self.peak = self.allocated


@pytest.mark.parametrize(("step", "left"), [(0, 52), (20, 32), (52, 0), (64, 0), (80, 0)])
def test_the_cache_gets_what_the_largest_steps_leave(step, left, monkeypatch):
    memory, device = Memory(step), CudaDevice.__new__(CudaDevice)
    device.torch_device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", memory.reset_peak_memory_stats)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: memory.peak)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: memory.allocated)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100 - memory.allocated, 100))
    settings = make_settings(gpu_memory_fraction=0.8)
    if left:
        assert device.kv_cache_bytes(settings, memory.try_steps) == left
        return
    with pytest.raises(SettingsError, match=r"no memory is left .* max_num_batched_tokens"):
        device.kv_cache_bytes(settings, memory.try_steps)


def test_batches_larger_than_any_recorded_one_run_all_the_same(recorder, monkeypatch, tmp_path):
    monkeypatch.setattr(graphs_module, "MAX_SIZE", 4)
    model = write_model(tmp_path, small("qwen3"))
    engine = LLM(str(tmp_path), device=DEVICE.type, cache_dir=str(tmp_path / "cache"), **SIZES)
    asked = [prompt[:5] for prompt in prompts()]
    results = engine.generate(asked, SamplingParams(temperature=0, max_tokens=6))
    for prompt, result in zip(asked, results, strict=True):
        assert result.outputs[0].token_ids == greedy(model, prompt, 6)
    engine.close()


def test_preempted_sequences_come_back_from_the_hosts_memory(recorder, tmp_path):
    model = write_model(tmp_path, small("qwen3"))
    sizes = {**SIZES, "num_blocks": 30, "block_size": 4, "max_model_len": 60, "swap_space_gb": 0.001}
    engine = LLM(str(tmp_path), device=DEVICE.type, cache_dir=str(tmp_path / "cache"), **sizes)
    asked = [prompts()[3][at : at + 33] for at in (0, 3, 6, 9)]
    results = engine.generate(asked, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
    counters = engine.engine.scheduler.counters
    assert counters.preemptions > 0 and counters.swapped_in > 0
    for prompt, result in zip(asked, results, strict=True):
        expected = greedy(model, prompt, 20)
        assert result.outputs[0].token_ids[: len(expected)] == expected
    engine.close()


def pairs(*blocks: tuple[int, int]) -> np.ndarray:
    return np.array(blocks, np.int32).reshape(-1, 2)


def test_blocks_move_out_before_they_are_filled_and_in_before_they_are_copied(recorder, tmp_path):
    write_model(tmp_path, small("qwen3"))
    engine = LLM(
        str(tmp_path), device=DEVICE.type, cache_dir=str(tmp_path / "cache"), swap_space_gb=0.001, **SIZES
    )
    runner = engine.engine.runner
    pool, host = runner._store.pool, runner._store.host_pool
    for number in range(9):
        pool[:, number], host[:, number] = number, 100 + number
    moves = {"swap_outs": pairs((3, 0)), "swap_ins": pairs((1, 3)), "copies": pairs((3, 5))}
    plan = replace(warm_up_plan(1, 1, 5, 0.0, 16), **moves)
    runner.forward(plan)
    runner.sample(plan)
    runner.wait(plan)
    assert (host[:, 0] == 3).all() and (pool[:, 3] == 101).all() and (pool[:, 5] == 101).all()
    engine.close()


def test_only_steps_in_which_each_sequence_samples_its_next_token_are_replayed(recorder, tmp_path):
    write_model(tmp_path, small("qwen3"))
    engine = LLM(str(tmp_path), device=DEVICE.type, cache_dir=str(tmp_path / "cache"), **SIZES)
    graphs = engine.engine.runner._graphs
    one = warm_up_plan(1, 1, 5, 0.0, 16)
    two = {name: np.array([0, 1], np.int32) for name in ("rows", "logit_index", "sample_rows")}
    both = {"starts": np.array([5, 5], np.int32), "counts": np.array([1, 1], np.int32), "num_sampled": 2}
    assert graphs.fits(one) and graphs.fits(replace(one, **two, **both))
    # The first is a prompt's part; the second forks into two samples.
    forked = {"logit_index": np.array([1, 1], np.int32), "sample_rows": np.array([1, 2], np.int32)}
    assert not graphs.fits(replace(one, **{**two, **both, **forked}))
    assert not graphs.fits(replace(one, counts=np.array([2], np.int32)))
    assert not graphs.fits(replace(one, **{**two, **both, "sample_rows": np.array([1, 0], np.int32)}))
    engine.close()


def test_what_a_device_cannot_do_is_refused(tmp_path):
    write_model(tmp_path, small("qwen3"))
    settings = {"cache_dir": str(tmp_path / "cache"), "num_blocks": 40}
    for refused, message in (
        ({"swap_space_gb": 4}, "swap_space_gb is 4, but on a CPU the KV cache is in the host"),
        ({"quantization": "fp8"}, "fp8, which needs the kernels of a GPU of compute capability 8.9"),
        ({"kv_cache_dtype": "fp8"}, "fp8, which needs the kernels of a GPU .*; use auto, or int8 on a CPU"),
        ({"kv_cache_dtype": "int8", "ops": "triton"}, "int8, which only the CPU's kernels have; .* fp8"),
    ):
        with pytest.raises(SettingsError, match=message):
            LLM(str(tmp_path), device="cpu", **settings, **refused)
    write_model(tmp_path, small("gemma2"))
    with pytest.raises(SettingsError, match="float16, which this model's values exceed; use bfloat16"):
        LLM(str(tmp_path), device="cpu", **settings, ops="triton", dtype="float16")


def test_the_hosts_memory_keeps_what_can_be_found(recorder, tmp_path):
    write_model(tmp_path, small("qwen3"))
    settings = {**SIZES, "swap_space_gb": 0.001, "enable_prefix_caching": False}
    with pytest.raises(SettingsError, match="needs enable_prefix_caching"):
        LLM(str(tmp_path), device=DEVICE.type, cache_dir=str(tmp_path / "cache"), **settings)


def answers(folder, **settings) -> tuple[list[list[int]], list[float]]:
    """Tokens of each prompt's answer, and their log-probabilities."""
    engine = LLM(str(folder), cache_dir=str(folder / "cache"), **{**SIZES, **settings})
    params = SamplingParams(temperature=0, max_tokens=4, logprobs=0)
    # Alone, a prompt longer than a step has one that samples nothing.
    results = [*engine.generate(prompts()[3:4], params), *engine.generate(prompts()[:3], params)]
    engine.close()
    found = [result.outputs[0] for result in results]
    return [one.token_ids for one in found], [score.logprob for one in found for score in one.logprobs]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("smollm2", {"quantization": "w8a8"}),
        ("qwen3", {"quantization": "w4a16"}),
        ("qwen3", {"kv_cache_dtype": "fp8"}),
        ("smollm2", {"quantization": "fp8", "kv_cache_dtype": "fp8"}),
    ],
)
def test_quantized_engines_say_what_plain_torch_says(name, settings, recorder, tmp_path):
    write_model(tmp_path, small(name))
    expected, scores = answers(tmp_path, ops="reference", device="cpu", **settings)
    found, own = answers(tmp_path, device=DEVICE.type, **settings)
    assert found == expected and own == pytest.approx(scores, abs=1e-3)
    _, exact = answers(tmp_path, ops="reference", device="cpu")
    assert exact != pytest.approx(scores, abs=3e-3), "nothing is rounded"


def test_the_scales_of_a_checkpoint_are_those_of_the_cache(recorder, tmp_path):
    write_model(tmp_path, small("qwen3"))
    tensors = load_file(tmp_path / "model.safetensors")
    before, _ = answers(tmp_path, device=DEVICE.type, kv_cache_dtype="fp8")
    for layer in range(2):
        tensors[f"model.layers.{layer}.self_attn.k_scale"] = torch.tensor(2.0**-4)
        tensors[f"model.layers.{layer}.self_attn.v_scale"] = torch.tensor([1e-4])
    save_file(tensors, tmp_path / "model.safetensors")
    found, _ = answers(tmp_path, device=DEVICE.type, kv_cache_dtype="fp8")
    assert found == answers(tmp_path, ops="reference", device="cpu", kv_cache_dtype="fp8")[0]
    assert found != before, "values beyond 448 scales are cut off"
    tensors["model.layers.1.self_attn.k_scale"] = torch.tensor(0.0)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match=r"1\.self_attn\.k_scale is no positive number"):
        answers(tmp_path, device=DEVICE.type, kv_cache_dtype="fp8")


RULES = {
    "greedy": SamplingParams(temperature=0, max_tokens=9),
    "samples": SamplingParams(seed=5, n=2, max_tokens=9),
    "samples of a part": SamplingParams(
        seed=6, temperature=0.7, top_k=20, top_p=0.8, min_p=0.02, max_tokens=9
    ),
    "penalties": SamplingParams(
        temperature=0, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.3, max_tokens=9
    ),
    "biases": SamplingParams(
        temperature=0, logit_bias={7: 5.0, 9: -100.0}, allowed_token_ids=tuple(range(6, 60)), max_tokens=9
    ),
    "log-probabilities": SamplingParams(temperature=0, logprobs=3, prompt_logprobs=2, max_tokens=7),
    "beams": SamplingParams(temperature=0, beam_width=2, n=2, max_tokens=7, ignore_eos=True),
}


@pytest.mark.parametrize("alone", [True, False])
def test_rules_give_the_tokens_that_the_reference_gives(alone, recorder, tmp_path):
    """Each of them by itself, where recorded steps serve it, and all in one batch, with guesses."""
    write_model(tmp_path, small("qwen3"))
    answers = []
    guesses = {} if alone else {"num_speculative_tokens": 3, "prompt_lookup_min": 1}
    for settings in ({**SIZES, **guesses}, {**SIZES, "ops": "reference", "device": "cpu"}):
        engine = LLM(str(tmp_path), cache_dir=str(tmp_path / "cache"), **settings)
        prompt = prompts()[2]
        if alone:
            answers.append([engine.generate([prompt], rule)[0] for rule in RULES.values()])
        else:
            answers.append(engine.generate([prompt] * len(RULES), list(RULES.values())))
        drafted = engine.engine.statistics().counters["drafted_tokens"]
        assert (drafted > 0) == ("num_speculative_tokens" in settings)
        engine.close()
    for name, ours, theirs in zip(RULES, *answers, strict=True):
        for one, other in zip(ours.outputs, theirs.outputs, strict=True):
            assert one.token_ids == other.token_ids, name
            assert [score.logprob for score in one.logprobs] == pytest.approx(
                [score.logprob for score in other.logprobs], abs=1e-3
            ), name


def test_sizes_of_recorded_batches_leave_little_padding():
    for largest in (1, 5, 32, 256, 300, 1024):
        sizes = graph_sizes(largest)
        assert sizes == sorted(set(sizes)) and sizes[-1] == largest
        assert all(after - before <= max(8, before / 8) for before, after in pairwise(sizes))


def test_the_interpreter_is_asked_for_by_name(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    write_model(tmp_path, small("qwen3"))
    with pytest.raises(SettingsError, match="TRITON_INTERPRET=1"):
        LLM(str(tmp_path), device="cpu", cache_dir=str(tmp_path / "cache"), **SIZES)
