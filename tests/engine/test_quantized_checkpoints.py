"""Checkpoints that are quantized already, in every form that is read: the same next tokens as transformers
has with the matrices that they stand for.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from models import FAMILIES, write_model
from pagetide.llm import LLM
from pagetide.models.config import UnsupportedModelError, read_json
from pagetide.models.convert import convert
from pagetide.models.gguf_codes import _KINDS
from pagetide.models.quantized import Scheme, read_matrix
from pagetide.models.source import find_codes, find_model
from pagetide.models.weights import Checkpoint, QuantizedAtLoad
from pagetide.ops.weights import DenseWeight, Fp8Weight, QuantizedWeight
from quality import context_logprobs, divergence
from safetensors.torch import load_file, save_file

PROMPT = [11, 60, 7, 150, 33, 90, 14, 2, 71]
GROUP = 16
Tensors = dict[str, torch.Tensor]
# Codes [out, in] from 0 on, zeros and scales [out, groups], the group of each input: to a module's tensors.
Form = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], Tensors]


def packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """[rows, n] to int32 [rows, n * bits / 32], the lowest bits first."""
    words = torch.zeros(len(codes), codes.shape[1] * bits // 32, dtype=torch.int64)
    for i in range(32 // bits):
        words |= codes[:, i :: 32 // bits].long() << bits * i
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def gptq(bits: int, shift: int = 1) -> Form:
    def form(codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, index: torch.Tensor) -> Tensors:
        return {
            "qweight": packed(codes, bits).T,
            "qzeros": packed((zeros - shift).T & (2**bits - 1), bits),
            "scales": scales.T.half(),
            "g_idx": index.int(),
        }

    return form


def awq(codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, index: torch.Tensor) -> Tensors:
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])

    def in_order(values: torch.Tensor) -> torch.Tensor:
        return packed(values.T.unflatten(1, (-1, 8))[..., order].flatten(1), 4)

    return {"qweight": in_order(codes), "qzeros": in_order(zeros), "scales": scales.T.half()}


def compressed(bits: int, is_symmetric: bool) -> Form:
    """As the library of that name packs it."""

    def form(codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, index: torch.Tensor) -> Tensors:
        tensors = {
            "weight_packed": pack_to_int32((codes - 2 ** (bits - 1)).to(torch.int8), bits),
            "weight_scale": scales.bfloat16(),
            "weight_shape": torch.tensor(codes.shape),
            "weight_g_idx": index.int(),
        }
        if not is_symmetric:
            offsets = (zeros - 2 ** (bits - 1)).to(torch.int8)
            tensors["weight_zero_point"] = pack_to_int32(offsets, bits, packed_dim=0)
        return tensors

    return form


def int8(codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, index: torch.Tensor) -> Tensors:
    return {"weight": (codes - 128).to(torch.int8), "weight_scale": scales.bfloat16()}


GROUPS = {"group_0": {"weights": {"num_bits": 4}, "targets": ["Linear"], "input_activations": None}}
W8A8 = {"group_0": {"weights": {"num_bits": 8}, "input_activations": {"num_bits": 8, "type": "int"}}}
# Bits, groups (0: one for all inputs), zeros (None: any), form, and what config.json says.
FORMS: dict[str, tuple[int, int, int | None, Form, dict[str, Any]]] = {
    "gptq": (4, GROUP, None, gptq(4), {"quant_method": "gptq", "bits": 4}),
    "gptq, all inputs together": (4, 0, 8, gptq(4), {"quant_method": "gptq", "bits": 4, "group_size": -1}),
    "gptq v2": (4, GROUP, None, gptq(4, 0), {"quant_method": "gptq", "checkpoint_format": "gptq_v2"}),
    "gptq, act order": (4, GROUP, None, gptq(4), {"quant_method": "gptq", "desc_act": True}),
    "gptq, 8 bits": (8, GROUP, 128, gptq(8), {"quant_method": "gptq", "bits": 8}),
    "gptq, 8 bits, asymmetric": (8, GROUP, None, gptq(8), {"quant_method": "gptq", "bits": 8}),
    "awq": (4, GROUP, None, awq, {"quant_method": "awq", "version": "gemm"}),
    "compressed": (4, GROUP, 8, compressed(4, True), {"quant_method": "compressed-tensors"}),
    "compressed, asymmetric": (
        4, GROUP, None, compressed(4, False), {"quant_method": "compressed-tensors", "config_groups": GROUPS},
    ),
    "compressed, 8 bits": (8, 0, 128, compressed(8, True), {"quant_method": "compressed-tensors"}),
    "compressed, W8A8": (8, 0, 128, int8, {"quant_method": "compressed-tensors", "config_groups": W8A8}),
}  # fmt: skip


def write_quantized(folder: Path, family: str, form: str) -> Any:
    """The folder of a quantized checkpoint; returns transformers' model with what its matrices stand for.

    Scales have few digits, so that bfloat16 has all of it.
    """
    bits, group, zero, tensors_of, settings = FORMS[form]
    model = write_model(folder, FAMILIES[family])
    tensors = load_file(folder / "model.safetensors")
    for name, module in model.model.layers.named_modules():
        if not isinstance(module, torch.nn.Linear) or name == "1.mlp.down_proj":  # one is left as it is
            continue
        outputs, inputs = module.weight.shape
        groups = inputs // group if group else 1
        codes = torch.randint(0, 2**bits, (outputs, inputs))
        zeros = torch.randint(2 ** (bits - 2), 3 * 2 ** (bits - 2), (outputs, groups))
        if zero is not None:
            zeros.fill_(zero)
        scales = torch.randint(4, 16, zeros.shape) * 2.0**-9 * 0.5 ** (bits - 4)
        index = torch.arange(inputs) // (inputs // groups)
        if "act order" in form:
            index = index[torch.randperm(inputs)]
        with torch.no_grad():
            module.weight.copy_((codes - zeros[:, index]) * scales[:, index])
        del tensors[f"model.layers.{name}.weight"]
        own = tensors_of(codes, zeros, scales, index)
        tensors |= {f"model.layers.{name}.{part}": tensor.contiguous() for part, tensor in own.items()}
    save_file(tensors, folder / "model.safetensors")
    config = read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return model


def expected_logprobs(model: Any) -> np.ndarray:
    with torch.inference_mode():
        return model(torch.tensor([PROMPT])).logits[0].log_softmax(-1).numpy()


def own_logprobs(model: str | Path, **settings: Any) -> np.ndarray:
    llm = LLM(str(model), dtype="float32", num_blocks=32, allow_logits=True, **settings)
    return context_logprobs(llm, PROMPT)


@pytest.mark.parametrize("form", FORMS)
def test_quantized_checkpoints(tmp_path, form):
    model = write_quantized(tmp_path, "mistral", form)
    found = divergence(expected_logprobs(model), own_logprobs(tmp_path))
    # What has no codes of its own has become codes of 8 bits: one matrix in all, some more in two forms.
    assert found.max() < (0.05 if "W8A8" in form else 2e-3), found


def test_every_device_has_the_same_matrices(tmp_path):
    """Plain torch multiplies what the codes stand for."""
    model = write_quantized(tmp_path, "qwen2.5", "awq")
    found = divergence(expected_logprobs(model), own_logprobs(tmp_path, ops="reference"))
    assert found.max() < 2e-3


@pytest.mark.parametrize("form", ["gptq", "awq", "compressed, asymmetric"])
def test_codes_stay_as_they_are(tmp_path, form):
    write_quantized(tmp_path, "mistral", form)
    checkpoint = Checkpoint(tmp_path, torch.bfloat16, torch.device("cpu"))
    weight = checkpoint.read_weight(("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"))
    assert isinstance(weight, QuantizedWeight)
    assert (weight.bits, weight.group, weight.activation_bits) == (4, GROUP, 16)
    left = ("model.layers.1.mlp.down_proj",)
    assert isinstance(checkpoint.read_weight(left), DenseWeight)
    assert isinstance(checkpoint.read_table("lm_head", 50, is_head=True), DenseWeight)
    uniform = QuantizedAtLoad(checkpoint, 8, None, rounds_head=False)
    kept = uniform.read_weight(("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"))
    assert isinstance(kept, QuantizedWeight) and torch.equal(kept.codes, weight.codes)
    rounded = uniform.read_weight(left)
    assert isinstance(rounded, QuantizedWeight) and rounded.bits == 8
    assert isinstance(uniform.read_table("lm_head", 50, is_head=True), DenseWeight)


def test_a_setting_says_how_activations_are_rounded(tmp_path):
    write_quantized(tmp_path, "mistral", "gptq")
    exact = own_logprobs(tmp_path, ops="reference", quantization="w4a16")
    wide, narrow = (
        divergence(exact, own_logprobs(tmp_path, quantization=each)).max() for each in ("w4a16", "w4a8")
    )
    assert wide < 0.2 * narrow < 0.04


def test_fp8_checkpoints(tmp_path):
    """With one scale, and with DeepSeek's blocks, the last of which are not whole."""
    model = write_model(tmp_path, FAMILIES["qwen3"])
    tensors = load_file(tmp_path / "model.safetensors")
    for number, (name, module) in enumerate(model.model.layers.named_modules()):
        if not isinstance(module, torch.nn.Linear):
            continue
        outputs, inputs = module.weight.shape
        blocks = (-(-outputs // 64), -(-inputs // 64)) if number % 2 else (1, 1)
        scales = torch.rand(blocks) * 0.01 + 0.001
        whole = scales.repeat_interleave(64 if number % 2 else outputs, 0)[:outputs]
        whole = whole.repeat_interleave(64 if number % 2 else inputs, 1)[:, :inputs]
        values = (module.weight / whole).clamp(-448, 448).to(torch.float8_e4m3fn)
        with torch.no_grad():
            module.weight.copy_(values.float() * whole)
        tensors[f"model.layers.{name}.weight"] = values
        part = "weight_scale_inv" if number % 2 else "weight_scale"
        tensors[f"model.layers.{name}.{part}"] = scales if number % 2 else scales.reshape(())
    save_file(tensors, tmp_path / "model.safetensors")
    config = read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}})
    )
    assert divergence(expected_logprobs(model), own_logprobs(tmp_path)).max() < 0.02
    checkpoint = Checkpoint(tmp_path, torch.bfloat16, torch.device("cpu"))
    layer = model.model.layers[0]
    forms = set()
    for module in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.down_proj"):
        found = checkpoint.read_weight((f"model.layers.0.{module}",))
        forms.add(type(found))
        torch.testing.assert_close(
            found.dense().float(), layer.get_submodule(module).weight, atol=0, rtol=2**-8
        )
    assert forms == {Fp8Weight, DenseWeight}, "blocks that are not whole have no kernel"
    # A head as well.
    size = tensors["model.embed_tokens.weight"].shape
    tensors["lm_head.weight"] = torch.randn(size).clamp(-400, 400).to(torch.float8_e4m3fn)
    tensors["lm_head.weight_scale"] = torch.full((size[0], 1), 0.03)
    save_file(tensors, tmp_path / "model.safetensors")
    with torch.no_grad():
        model.lm_head.weight.copy_(tensors["lm_head.weight"].float() * 0.03)
    assert divergence(expected_logprobs(model), own_logprobs(tmp_path)).max() < 0.02


@pytest.mark.parametrize("form", ["gptq", "compressed"])
def test_a_quantized_head_is_read(tmp_path, form):
    """It has no tensor called lm_head.weight, which is no sign of a head that is the embedding."""
    model = write_quantized(tmp_path, "mistral", form)
    tensors = load_file(tmp_path / "model.safetensors")
    size = tensors.pop("lm_head.weight").shape  # 199 tokens do not fill the packed words of GPTQ
    codes, scales = torch.randint(0, 16, (200, size[1])), torch.full((200, size[1] // GROUP), 2.0**-5)
    index, zeros = torch.arange(size[1]) // GROUP, torch.full_like(scales, 8, dtype=torch.int64)
    own = FORMS[form][3](codes, zeros, scales, index)
    save_file(
        {**tensors, **{f"lm_head.{p}": t.contiguous() for p, t in own.items()}},
        tmp_path / "model.safetensors",
    )
    with torch.no_grad():
        model.lm_head.weight.copy_(((codes - 8) * 2.0**-5)[:199])
    assert divergence(expected_logprobs(model), own_logprobs(tmp_path)).max() < 2e-3


def test_dense_matrices_become_what_was_asked_for(tmp_path):
    """Also where others of the checkpoint are codes, and where its values are FP8."""
    write_quantized(tmp_path, "mistral", "gptq")
    checkpoint = Checkpoint(tmp_path, torch.bfloat16, torch.device("cpu"))
    four = QuantizedAtLoad(checkpoint, 4, 8, rounds_head=True)
    for name, bits in (("model.layers.1.mlp.down_proj", 4), ("model.layers.0.mlp.down_proj", 4)):
        found = four.read_weight((name,))
        assert isinstance(found, QuantizedWeight) and (found.bits, found.activation_bits) == (bits, 8)
    head = four.read_table("lm_head", 50, is_head=True)
    assert isinstance(head, QuantizedWeight) and head.bits == 8
    eight = QuantizedAtLoad(checkpoint, 8, 16, rounds_head=True).read_weight(
        ("model.layers.0.mlp.down_proj",)
    )
    assert isinstance(eight, QuantizedWeight) and eight.bits == 8


def raw_of(tensors: Tensors) -> Any:
    class Raw(dict):
        def raw(self, name: str) -> torch.Tensor:
            return self[name]

    return Raw({f"m.{name}": tensor for name, tensor in tensors.items()})


def test_zero_points_of_older_and_of_8_bit_compressed_tensors():
    codes, zeros = torch.randint(0, 16, (24, 64)), torch.randint(3, 12, (24, 2))
    scales = torch.full((24, 2), 0.25)
    packed = compressed(4, True)(codes, zeros, scales, torch.arange(64) // 32)
    older = raw_of({**packed, "weight_zero_point": (zeros - 8).to(torch.int8)})
    found = read_matrix(older, "m", Scheme("compressed-tensors"), torch.float32).dense()
    assert torch.equal(found, (codes - zeros.repeat_interleave(32, 1)) * 0.25)
    signed, point = torch.randint(-128, 128, (24, 64)), torch.randint(-9, 9, (24, 1))
    tensors = {
        "weight": signed.to(torch.int8),
        "weight_scale": torch.full((24, 1), 0.25),
        "weight_zero_point": point.to(torch.int8),
    }
    found = read_matrix(raw_of(tensors), "m", Scheme("compressed-tensors"), torch.float32).dense()
    assert torch.equal(found, (signed - point) * 0.25)


def test_scales_next_to_dense_matrices_are_not_used_again():
    values = torch.randn(8, 32).bfloat16()
    raw = raw_of({"weight": values, "weight_scale": torch.full((1,), 0.01)})
    for method in ("compressed-tensors", "fp8"):
        assert torch.equal(read_matrix(raw, "m", Scheme(method), torch.bfloat16).dense(), values)


def test_one_scale_for_all_packed_codes():
    codes = torch.randint(0, 16, (24, 64))
    tensors = compressed(4, True)(codes, codes, torch.ones(24, 2), -torch.ones(64))
    tensors["weight_scale"] = torch.tensor([0.5])
    found = read_matrix(raw_of(tensors), "m", Scheme("compressed-tensors"), torch.float32).dense()
    assert torch.equal(found, (codes - 8) * 0.5)


def test_an_order_that_was_never_made_is_none():
    """Groups of -1, as compressed-tensors initializes them."""
    codes = torch.randint(0, 16, (24, 64))
    tensors = compressed(4, True)(codes, codes, torch.full((24, 2), 0.5), -torch.ones(64))
    tensors["weight_scale"][:, 1] = 2
    found = read_matrix(raw_of(tensors), "m", Scheme("compressed-tensors"), torch.float32)
    assert isinstance(found, QuantizedWeight) and found.group == 32
    assert torch.equal(found.dense(), (codes - 8) * torch.tensor([0.5] * 32 + [2] * 32))


def test_a_layout_that_does_not_fit_is_told():
    tensors = gptq(4)(torch.zeros(16, 40).int(), torch.zeros(16, 3).int(), torch.ones(16, 3), torch.zeros(40))
    del tensors["g_idx"]
    with pytest.raises(UnsupportedModelError, match="m is not laid out as in gptq checkpoints: 40 inputs"):
        read_matrix(raw_of(tensors), "m", Scheme("gptq"), torch.float32)


def test_an_engine_multiplies_the_codes_of_the_checkpoint(tmp_path):
    write_quantized(tmp_path, "mistral", "awq")
    llm = LLM(str(tmp_path), num_blocks=32)
    bits = llm.engine.runner.decoder.layers._weights.gate_up_forms[:, 1]
    assert bits.tolist() == [4, 4, 4]


def test_settings_that_were_left_over_mean_nothing(tmp_path):
    write_model(tmp_path, FAMILIES["mistral"])
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 4}))
    assert not Checkpoint(tmp_path, torch.float32, torch.device("cpu")).is_quantized


def test_the_older_file_of_settings_is_read(tmp_path):
    model = write_quantized(tmp_path, "mistral", "gptq")
    config = read_json(tmp_path / "config.json")
    settings = config.pop("quantization_config")
    del settings["quant_method"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "quantize_config.json").write_text(json.dumps(settings))
    assert divergence(expected_logprobs(model), own_logprobs(tmp_path)).max() < 2e-3


@pytest.mark.parametrize("settings", [None, {"quant_method": "fp8"}])
def test_bytes_that_nobody_explains_are_refused(tmp_path, settings):
    write_model(tmp_path, FAMILIES["mistral"])
    config = read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.self_attn.o_proj.weight"
    save_file({**tensors, name: tensors[name].to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(
        UnsupportedModelError, match=r"o_proj\.weight is of type float8_e4m3fn, and the checkpoint"
    ):
        LLM(str(tmp_path), num_blocks=32)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "bitsandbytes"}, "quantized by bitsandbytes; known: awq, compressed-tensors, fp8"),
        ({"quant_method": "awq", "version": "gemv"}, "awq version is gemv; known: gemm"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "gptq checkpoint_format is marlin; known"),
        ({"quant_method": "compressed-tensors", "format": "marlin-24"}, "format is marlin-24; known: pack-q"),
        ({"quant_method": "compressed-tensors", "transform_config": {"a": 1}}, "rotates activations"),
        ({"bits": 4}, "quantized by an unnamed method"),
    ],
)
def test_unknown_forms_are_refused(tmp_path, settings, message):
    write_model(tmp_path, FAMILIES["mistral"])
    config = read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    with pytest.raises(UnsupportedModelError, match=message):
        LLM(str(tmp_path), num_blocks=32)


def test_other_bits_are_refused(tmp_path):
    write_quantized(tmp_path, "mistral", "gptq")
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.self_attn.o_proj.qzeros"
    tensors[name] = tensors[name][:, ::2].contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match="o_proj has codes of 2 bits; known: 4 and 8"):
        LLM(str(tmp_path), num_blocks=32)


@pytest.mark.parametrize("kind", _KINDS)
def test_blocks_of_gguf_files(kind):
    """Any bytes are blocks."""
    kind_of = gguf.GGMLQuantizationType[kind]
    block_bytes, bits, unpack = _KINDS[kind]
    elements = gguf.GGML_QUANT_SIZES[kind_of][0]
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (20, block_bytes), dtype=np.uint8)
    for at in {"Q4_K": (0, 2), "Q4_1": (0, 2), "Q6_K": (208,)}.get(kind, (0,)):
        blocks[:, at : at + 2] = rng.normal(size=20).astype(np.float16)[:, None].view(np.uint8)
    codes, scales, minima = unpack(blocks)
    assert codes.shape == (20, elements) and codes.max() < 2**bits
    values = codes.reshape(20, scales.shape[1], -1) * scales[..., None] + minima[..., None]
    expected = gguf.quants.dequantize(blocks, kind_of).reshape(20, -1)
    np.testing.assert_allclose(values.reshape(20, -1), expected, rtol=1e-5, atol=1e-5)


def test_the_embedded_model_is_served_as_its_file_has_it(tmp_path):
    """The codes of the file, not of what they stand for; the dense model is next to it."""
    cache = Path(".cache")
    model = find_model("", cache)
    codes = find_codes("", model, cache)
    own = Checkpoint(model, torch.float32, torch.device("cpu"), codes)
    dense = Checkpoint(model, torch.float32, torch.device("cpu"))
    assert find_codes(str(model), model, cache) is None
    names = tuple(f"model.layers.7.self_attn.{part}_proj" for part in "qkv")
    for found, right in (
        (own.read_weight(names), dense.read_weight(names)),
        (own.read_table("model.embed_tokens", 900, True), dense.read_table("model.embed_tokens", 900, True)),
    ):
        assert isinstance(found, QuantizedWeight) and found.group == 32
        # Scales are rounded to bfloat16, and so are the dense model's values.
        torch.testing.assert_close(found.dense(), right.dense(), rtol=0.01, atol=0.01)
    llm = LLM("", cache_dir=str(cache), num_blocks=64, quantization="w4a16")
    assert llm.generate("The capital of France is")[0].outputs[0].text


def test_a_conversion_of_codes_without_room_is_told(tmp_path):
    with pytest.raises(OSError):
        convert("codes", tmp_path / "missing.gguf", tmp_path / "codes.safetensors", tmp_path / "config.json")
