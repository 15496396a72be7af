"""Packed weights of converted models are kept, and made anew when they no longer fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from models import FAMILIES, greedy, write_model
from pagetide.llm import LLM
from pagetide.models import source
from pagetide.models.weights import Checkpoint
from pagetide.ops.cpu import kept
from pagetide.types import SamplingParams

PROMPT = [11, 60, 7, 150, 33]


def tokens(cache: Path, model: str = "small", dtype: str = "float32") -> list[int]:
    llm = LLM(str(cache / "models" / model), cache_dir=str(cache), dtype=dtype, num_blocks=32)
    params = SamplingParams(temperature=0, max_tokens=8)
    return llm.generate([PROMPT], params)[0].outputs[0].token_ids


@pytest.mark.parametrize("family", ["llama2", "llama3.1", "qwen2.5"])
def test_kept_weights_give_the_same_tokens_without_the_checkpoint(tmp_path, monkeypatch, family):
    folder = tmp_path / "models" / "small"
    model = write_model(folder, FAMILIES[family])
    expected = greedy(model, PROMPT, 8)
    assert tokens(tmp_path) == expected
    packed = {path.name for path in folder.glob("packed-*") if path.is_dir()}
    assert len(packed) == 2

    def no_reading(*_: object) -> None:
        raise AssertionError("the layers are read again")

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "read_weight", no_reading)
        assert tokens(tmp_path) == expected
    for array in (np.load(file, mmap_mode="r") for file in folder.glob("packed-*/*.npy")):
        assert not array.size or array.ctypes.data % 64 == 0, "tiles load whole cache lines"
    assert {path.name for path in folder.glob("packed-*") if path.is_dir()} == packed


def test_another_checkpoint_or_type_is_packed_anew(tmp_path):
    folder = tmp_path / "models" / "small"
    write_model(folder, FAMILIES["llama2"])
    tokens(tmp_path)
    before = {path.name for path in folder.glob("packed-layers-*") if path.is_dir()}
    tokens(tmp_path, dtype="bfloat16")
    assert len([path for path in folder.glob("packed-layers-*") if path.is_dir()]) == 2
    other = write_model(folder, FAMILIES["mistral"])
    assert tokens(tmp_path) == greedy(other, PROMPT, 8)
    after = {path.name for path in folder.glob("packed-layers-float32-*") if path.is_dir()}
    assert len(after) == 1 and not after & before, "what no longer fits is gone"


def test_where_nothing_can_be_kept_the_model_runs(tmp_path, monkeypatch, caplog):
    folder = tmp_path / "models" / "small"
    model = write_model(folder, FAMILIES["llama2"])

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(kept, "make_once", full)
    assert tokens(tmp_path) == greedy(model, PROMPT, 8)
    assert "no space left" in caplog.text
    monkeypatch.undo()
    monkeypatch.setattr(np, "save", full)
    assert tokens(tmp_path) == greedy(model, PROMPT, 8)
    assert not [path for path in folder.glob("packed-*") if path.is_dir()]


def test_torn_files_do_not_keep_the_model_from_running(tmp_path, caplog):
    folder = tmp_path / "models" / "small"
    model = write_model(folder, FAMILIES["llama2"])
    tokens(tmp_path)
    for file in folder.glob("packed-*/*.npy"):
        file.write_bytes(file.read_bytes()[:50])
    assert tokens(tmp_path) == greedy(model, PROMPT, 8)
    assert "packed weights are not kept" in caplog.text


def test_other_folders_are_left_alone(tmp_path, monkeypatch):
    folder = tmp_path / "elsewhere"
    model = write_model(folder, FAMILIES["llama2"])
    before = sorted(folder.iterdir())
    cache = tmp_path / "cache"

    def start(**settings: bool) -> None:
        llm = LLM(str(folder), cache_dir=str(cache), dtype="float32", num_blocks=32, **settings)
        params = SamplingParams(temperature=0, max_tokens=8)
        assert llm.generate([PROMPT], params)[0].outputs[0].token_ids == greedy(model, PROMPT, 8)
        assert sorted(folder.iterdir()) == before

    start()
    assert not (cache / "packed").exists(), "it is small"
    monkeypatch.setattr(source, "_LARGE", 1000)
    start(keep_packed_weights=False)
    assert not (cache / "packed").exists()
    start()
    assert len(list(cache.glob("packed/elsewhere-*/packed-*/complete"))) == 2
