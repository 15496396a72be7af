"""Model folders as they are found: files that contradict each other, lack, or are left over; caches that
cannot be written.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from models import FAMILIES, SIZES, write_model
from pagetide.config import Settings, make_settings
from pagetide.llm import LLM
from pagetide.models import source
from pagetide.models.config import UnsupportedModelError
from pagetide.models.families import read_model
from pagetide.models.source import find_model
from pagetide.models.weights import Checkpoint
from pagetide.ops.cpu.threads import num_usable_cores
from pagetide.serving.defaults import read_defaults
from pagetide.text.tokens import Vocabulary
from pagetide.types import SamplingParams
from safetensors.torch import save_file

CPU = torch.device("cpu")


def tokenizer_json(size: int) -> str:
    vocabulary = {f"t{i}": i for i in range(size)}
    return json.dumps(
        {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": vocabulary, "merges": []}}
    )


def add_json(folder: Path, name: str, **values) -> None:
    (folder / name).write_text(json.dumps(values))


@pytest.mark.parametrize(
    "config, generation, tokenizer, expected",
    [
        (5, None, None, {5}),
        (5, [6, 7], None, {5, 6, 7}),
        (None, None, "t9", {9}),
        (5, 6, "t9", {5, 6, 9}),
        (None, None, None, set()),
        (10**6, [7], None, {7}),
    ],
)
def test_ends_are_those_of_all_files(tmp_path, config, generation, tokenizer, expected):
    write_model(tmp_path, FAMILIES["llama2"])
    raw = json.loads((tmp_path / "config.json").read_text())
    add_json(tmp_path, "config.json", **{**raw, "eos_token_id": config})
    add_json(tmp_path, "generation_config.json", eos_token_id=generation)
    add_json(
        tmp_path, "tokenizer_config.json", eos_token=tokenizer, added_tokens_decoder={"9": {"content": "t9"}}
    )
    assert read_model(tmp_path)[1].end_ids == expected


def test_the_index_goes_before_files_that_are_left_over(tmp_path):
    model = write_model(tmp_path, FAMILIES["llama2"], shards=True)
    assert (tmp_path / "model.safetensors.index.json").exists()
    save_file(
        {"model.norm.weight": torch.zeros(96), "lm_head.weight": torch.zeros(199, 96)},
        tmp_path / "model.safetensors",
    )
    checkpoint = Checkpoint(tmp_path, torch.float32, CPU)
    for name in ("model.norm.weight", "lm_head.weight"):
        assert torch.equal(checkpoint.read(name), model.state_dict()[name])
    shard = next(tmp_path.glob("model-*.safetensors"))
    shard.unlink()
    with pytest.raises(UnsupportedModelError, match=f"lacks {shard.name}"):
        Checkpoint(tmp_path, torch.float32, CPU)


def test_a_tokenizer_of_older_files_is_converted(tmp_path):
    write_model(tmp_path / "model", FAMILIES["qwen2.5"])
    vocabulary = {chr(ord("a") + i): i for i in range(26)} | {"ab": 26, "<|endoftext|>": 27}
    (tmp_path / "model" / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "model" / "merges.txt").write_text("#version: 0.2\na b\n")
    add_json(
        tmp_path / "model",
        "tokenizer_config.json",
        tokenizer_class="Qwen2Tokenizer",
        eos_token="<|endoftext|>",
        unk_token=None,
    )
    found = find_model(str(tmp_path / "model"), tmp_path / "cache")
    assert Vocabulary.read(found).encode("abc") == (26, 2)
    assert torch.equal(
        Checkpoint(found, torch.float32, CPU).read("model.norm.weight"),
        Checkpoint(tmp_path / "model", torch.float32, CPU).read("model.norm.weight"),
    )


def test_a_tokenizer_that_cannot_be_converted_is_refused_with_the_reason(tmp_path):
    write_model(tmp_path / "model", FAMILIES["qwen2.5"])
    (tmp_path / "model" / "vocab.json").write_text("{")
    with pytest.raises(
        UnsupportedModelError, match=r"has no tokenizer\.json, and none can be made from vocab\.json"
    ):
        find_model(str(tmp_path / "model"), tmp_path / "cache")
    assert not list((tmp_path / "cache" / "models").glob("*.unfinished"))


def test_yarn_makes_the_context_longer(tmp_path):
    rope = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 512,
    }
    write_model(tmp_path, type(FAMILIES["qwen2.5"])(**SIZES, rope_parameters=rope))
    assert read_model(tmp_path)[1].max_position == 2048


def test_tokens_beyond_the_tokenizers_are_never_sampled(tmp_path):
    write_model(tmp_path, FAMILIES["llama2"])
    (tmp_path / "tokenizer.json").write_text(tokenizer_json(40))
    llm = LLM(str(tmp_path), dtype="float32", num_blocks=64)
    results = llm.generate(
        [[1, 2, 3]] * 8,
        [SamplingParams(temperature=5.0, seed=i, max_tokens=40, ignore_eos=True) for i in range(8)],
    )
    llm.close()
    assert {token for result in results for token in result.outputs[0].token_ids} <= set(range(40))


@pytest.mark.parametrize(
    "file, expected",
    [({"do_sample": False, "temperature": 0.7}, 0.0), ({"do_sample": True, "temperature": 0.7}, 0.7)],
)
def test_a_generation_config_that_does_not_sample_is_greedy(tmp_path, file, expected):
    add_json(tmp_path, "generation_config.json", **file)
    assert read_defaults(tmp_path, Settings()).params.temperature == expected


# -- the cache ---------------------------------------------------------------------------------------------


@pytest.fixture
def small_gguf(tmp_path, monkeypatch) -> Path:
    """A file that is converted in a moment."""
    file = tmp_path / "small.gguf"
    file.write_bytes(b"x")

    def convert(kind: str, file: Path, target: Path) -> None:
        for name in ("config.json", "tokenizer.json", "model.safetensors"):
            (target / name).write_text("{}")

    monkeypatch.setattr(source, "convert", convert)
    return file


def test_a_torn_conversion_is_made_again(tmp_path, small_gguf):
    first = find_model(str(small_gguf), tmp_path / "cache")
    (first / "tokenizer.json").unlink()
    shutil.copytree(first, first.with_name(first.name + ".unfinished"))
    assert find_model(str(small_gguf), tmp_path / "cache") == first
    assert (first / "tokenizer.json").exists() and [p.name for p in first.parent.iterdir() if p.is_dir()] == [
        first.name
    ]


def test_a_cache_that_cannot_be_written_is_only_warned_about(tmp_path, small_gguf, monkeypatch, caplog):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "elsewhere"))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "cache").write_text("a file is in its place")
    found = find_model(str(small_gguf), tmp_path / "cache")
    assert (
        found.is_relative_to(tmp_path / "elsewhere") and "cannot be used for converted models" in caplog.text
    )


def test_a_conversion_without_any_room_says_so_and_leaves_nothing(tmp_path, small_gguf, monkeypatch):
    def full(kind: str, file: Path, target: Path) -> None:
        (target / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(source, "convert", full)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(UnsupportedModelError, match="No space left on device"):
        find_model(str(small_gguf), tmp_path / "cache")
    assert not [path for path in tmp_path.rglob("*") if path.is_dir() and "small" in path.name]


def test_a_user_without_a_home_gets_a_cache_all_the_same(monkeypatch):
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: (_ for _ in ()).throw(KeyError(uid)))
    assert str(os.getuid()) in str(make_settings(cache_dir="~/x").cache_path)


# -- cores -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, limit",
    [
        ("max 100000", None),
        ("100000 100000", 1),
        ("150000 100000", 1),
        ("400000 100000", 4),
        ("5000 100000", 1),
    ],
)
def test_a_quota_of_processor_time_limits_the_threads(tmp_path, text, limit):
    (tmp_path / "cpu.max").write_text(text)
    cores = len(os.sched_getaffinity(0))
    assert num_usable_cores(tmp_path) == (cores if limit is None else min(cores, limit))


def test_an_older_kernels_quota_counts_too(tmp_path):
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("100000\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert num_usable_cores(tmp_path) == 1
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    assert (
        num_usable_cores(tmp_path) == len(os.sched_getaffinity(0)) == num_usable_cores(tmp_path / "nothing")
    )


# -- LLM ---------------------------------------------------------------------------------------------------


def test_generate_takes_more_prompts_than_the_queue_and_works_after_an_error(tmp_path):
    write_model(tmp_path, FAMILIES["llama2"])
    (tmp_path / "tokenizer.json").write_text(tokenizer_json(199))
    llm = LLM(str(tmp_path), dtype="float32", num_blocks=64, max_queued_requests=8)
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    results = llm.generate([[1 + i % 50] for i in range(100)], params)
    assert (
        all(len(result.outputs[0].token_ids) == 3 for result in results)
        and results[0].outputs[0].token_ids == results[50].outputs[0].token_ids
    )
    # Token 5 is the only one allowed, and it may not come: the request fails while others run.
    stuck = SamplingParams(temperature=0, max_tokens=3, min_tokens=2, allowed_token_ids=(5,))
    with pytest.raises(ValueError, match="no token is left to choose"):
        llm.generate([[1], [2], [3]], [params, stuck, params])
    assert llm.generate([[1]], params)[0].outputs[0].token_ids == results[0].outputs[0].token_ids
    llm.close()


def test_versions_of_conversions_do_not_mix(small_gguf, tmp_path, monkeypatch):
    first = find_model(str(small_gguf), tmp_path / "cache")
    monkeypatch.setattr(source, "_VERSION", source._VERSION + 1)
    assert find_model(str(small_gguf), tmp_path / "cache") != first
