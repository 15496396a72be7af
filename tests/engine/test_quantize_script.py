"""scripts/quantize.py: our engine and transformers read what it writes, and a sample makes that better."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import pytest
import torch
from models import FAMILIES, write_model
from pagetide.models.weights import Checkpoint
from pagetide.ops.weights import QuantizedWeight
from quantize import Codes, write
from transformers import AutoModelForCausalLM
from triton_server import ROOT


def texts(count: int, seed: int) -> list[list[int]]:
    """Tokens of which some are much likelier than others."""
    chooser = random.Random(seed)
    likely = chooser.choices(range(6, 199), k=12)
    return [[chooser.choice([*likely, chooser.randrange(6, 199)]) for _ in range(48)] for _ in range(count)]


def logprobs(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor(texts(6, 0)[3:])).logits.log_softmax(-1)


@pytest.mark.parametrize("name", ["qwen3", "llama3.1"])
@pytest.mark.parametrize(("bits", "group", "most"), [(4, 16, 0.3), (8, 16, 0.003)])
def test_a_sample_makes_it_better(name, bits, group, most, tmp_path):
    exact = write_model(tmp_path / "model", FAMILIES[name])
    expected = logprobs(exact)
    lost = {}
    for way, sample in (("nearest", None), ("sample", texts(3, 0))):
        (tmp_path / way).mkdir()
        write(tmp_path / way, tmp_path / "model", Codes(bits, group), sample)
        read = AutoModelForCausalLM.from_pretrained(tmp_path / way, dtype=torch.float32).eval()
        lost[way] = float((expected.exp() * (expected - logprobs(read))).sum(-1).mean())
        checkpoint = Checkpoint(tmp_path / way, torch.float32, torch.device("cpu"))
        for module in ("self_attn.o_proj", "mlp.down_proj"):
            own = checkpoint.read_weight((f"model.layers.1.{module}",))
            assert isinstance(own, QuantizedWeight) and (own.bits, own.group) == (bits, group)
            theirs = read.model.layers[1].get_submodule(module).weight
            torch.testing.assert_close(own.dense(), theirs.float(), atol=1e-6, rtol=1e-5)
    assert lost["sample"] < 0.9 * lost["nearest"] < most


def test_codes_are_the_nearest_where_inputs_have_nothing_in_common():
    torch.manual_seed(0)
    weights, codes = torch.randn(8, 64), Codes(4, 32)
    found, scales = codes.round(weights, torch.eye(64))
    for at in range(0, 64, 32):
        nearest = codes.codes(weights[:, at : at + 32], scales[:, at // 32])
        assert torch.equal(found[:, at : at + 32].float(), nearest)


def quantize(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "quantize.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_the_embedded_model_from_the_command_line(tmp_path):
    """With what it says itself as the sample; what cannot be is refused."""
    text = tmp_path / "text.txt"
    text.write_text("")
    made = tmp_path / "made"
    for arguments, message in (
        (["--group", "128"], "576, 1536 inputs, which are no whole groups of 128; possible: 32, 64"),
        (["--group", "64", "--text", str(text)], "is empty"),
    ):
        refused = quantize(str(made), *arguments)
        assert refused.returncode and message in refused.stderr and not made.exists()
    done = quantize(str(made), "--group", "64", "--samples", "2")
    assert done.returncode == 0, done.stderr[-2000:]
    assert {"tokenizer.json", "config.json", "model.safetensors"} <= {file.name for file in made.iterdir()}
    settings = json.loads((made / "config.json").read_text())["quantization_config"]
    assert settings["format"] == "pack-quantized" and settings["ignore"] == ["lm_head"]
    assert "exists already" in quantize(str(made), "--group", "64").stderr
    again = quantize(str(tmp_path / "again"), "--model", str(made), "--group", "64", "--nearest")
    assert "is quantized already" in again.stderr
