"""scripts/quantize.py: our engine and transformers read what it writes, and a sample makes that better."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import pytest
import torch
from models import FAMILIES, SIZES, write_model
from pagetide.models.weights import Checkpoint
from pagetide.ops.weights import QuantizedWeight
from quantize import Codes, check, first_inputs, hidden_of, tokens_of, write
from transformers import AutoModelForCausalLM, LlamaConfig
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


def test_layers_of_different_kinds_are_called_with_their_own_angles(tmp_path):
    model = write_model(tmp_path, FAMILIES["gemma3"])
    sample = texts(2, 0)
    with torch.inference_mode():
        for ids, inputs in zip(sample, first_inputs(model, sample), strict=True):
            args = inputs.args
            for layer, kwargs in zip(model.model.layers, inputs.kwargs, strict=True):
                args = hidden_of(layer(*args, **kwargs)), *args[1:]
            expected = model.model(torch.tensor([ids])).last_hidden_state
            torch.testing.assert_close(model.model.norm(args[0]), expected)


def test_codes_are_the_nearest_where_inputs_have_nothing_in_common():
    torch.manual_seed(0)
    weights, codes = torch.randn(8, 64), Codes(4, 32)
    found, scales = codes.round(weights, torch.eye(64))
    for at in range(0, 64, 32):
        nearest = codes.codes(weights[:, at : at + 32], scales[:, at // 32])
        assert torch.equal(found[:, at : at + 32].float(), nearest)


def test_what_cannot_be_is_refused(tmp_path):
    write_model(tmp_path, LlamaConfig(**{**SIZES, "intermediate_size": 160}))
    with pytest.raises(SystemExit, match="96, 160 inputs, which are no whole groups of 128; possible: 32"):
        check(tmp_path, Codes(4, 128))
    text = tmp_path / "text.txt"
    text.write_text("\n")
    with pytest.raises(SystemExit, match="is empty"):
        tokens_of(text, tmp_path, 2, 8)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {}}))
    with pytest.raises(SystemExit, match="is quantized already"):
        check(tmp_path, Codes(4, 32))


def test_the_command_line(tmp_path):
    """With what the model says itself as the sample."""
    model, made = tmp_path / "model", tmp_path / "made"
    write_model(model, LlamaConfig(**{**SIZES, "intermediate_size": 160}))
    command = [sys.executable, str(ROOT / "scripts" / "quantize.py"), str(made), "--model", str(model)]
    done = subprocess.run(
        [*command, "--group", "32", "--samples", "2"], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert {file.name for file in made.iterdir()} >= {"config.json", "model.safetensors"}
    settings = json.loads((made / "config.json").read_text())["quantization_config"]
    assert settings["format"] == "pack-quantized" and settings["ignore"] == ["lm_head"]
