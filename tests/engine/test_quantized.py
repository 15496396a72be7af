"""Quantized matrices: what rounding may cost, kernels against plain torch over random shapes and on older
processors, and whole models.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import give_adapters, random_layers, rotary_like, run_on_older_processor, run_steps
from hypothesis import given, settings
from hypothesis import strategies as st
from models import FAMILIES, write_model
from numba import prange
from pagetide.config import SettingsError
from pagetide.llm import LLM
from pagetide.models.config import UnsupportedModelError
from pagetide.ops import weights as weights_module
from pagetide.ops.adapters import AdapterRoom
from pagetide.ops.attention import HeadShape
from pagetide.ops.cpu.codes import (
    add_block,
    encode_row,
    join_codes,
    make_rounded,
    pack_codes,
    read_code_rows,
)
from pagetide.ops.cpu.codes_tile import CODE_ROWS
from pagetide.ops.cpu.compiled import as_numpy, borrowed, kernel
from pagetide.ops.cpu.embedding import CompiledEmbedding
from pagetide.ops.cpu.layers import PHASES, CompiledLayers
from pagetide.ops.layers import Affine, ComposedLayers, EmbeddingWeights, LayerShape, LayerWeights
from pagetide.ops.plain import TORCH_LAYERS, TorchEmbedding
from pagetide.ops.weights import (
    DenseWeight,
    Fp8Weight,
    QuantizedWeight,
    columns_of,
    quantize,
    quantize_fp8,
    rearranged,
    stacked,
)
from pagetide.types import SamplingParams
from quality import TEXT, WINDOW, context_logprobs, divergence, settings_of

PROMPT = [11, 60, 7, 150, 33, 90, 14, 2, 71]
relaxed = settings(max_examples=40)


def values_of(weight: QuantizedWeight) -> torch.Tensor:
    """What the codes stand for, not rounded."""
    return replace(weight, dtype=torch.float32).dense()


def rounded(x: torch.Tensor, weight: QuantizedWeight) -> torch.Tensor:
    """Activations as a quantized matrix multiplies them."""
    grouped = x.float().unflatten(1, (-1, weight.group))
    scales = grouped.abs().amax(2, keepdim=True) / (127 if weight.activation_bits == 8 else 127 * 256)
    return (torch.where(scales > 0, grouped / scales, 0).round() * scales).flatten(1)


@relaxed
@given(
    st.sampled_from([4, 8]),
    st.sampled_from([16, 48, 96, 192]),
    st.sampled_from([1e-6, 0.02, 1.0, 3e4]),
    st.sampled_from([-2.0, 0.0, 5.0]),
    st.integers(0, 99),
)
def test_codes_are_the_nearest(bits, inputs, size, shift, seed):
    torch.manual_seed(seed)
    values = (torch.randn(7, inputs) + shift) * size
    values[0], values[1] = 0, size
    weight = quantize(values, bits)
    error = (values_of(weight) - values).abs().unflatten(1, (-1, weight.group))
    steps = weight.scales[..., None]
    if bits == 8:
        # Scales are rounded, so that the largest of a group may be cut off by 1/256 of itself.
        assert (error <= steps * 0.51 + values.abs().amax() / 200).all()
        assert (weight.minima == -128 * weight.scales).all()
    else:
        spread = values.unflatten(1, (-1, weight.group))
        spread = spread.amax(2) - spread.amin(2)
        limit = (spread / 15)[..., None].square() / 3 + (values.abs().amax() / 128).square()
        assert (error.square().mean(2, keepdim=True) <= limit).all()
    assert (weight.codes[0] == weight.codes[0, 0]).all(), "zeros stay zeros"
    assert values_of(weight)[0].abs().max() == 0


def test_a_matrix_without_groups_is_refused():
    with pytest.raises(ValueError, match="40 inputs has no groups of 16"):
        quantize(torch.randn(8, 40), 8)


def test_one_matrix_of_several():
    parts = [torch.randn(n, 64) for n in (8, 24, 40)]
    together = stacked([quantize(part, 4) for part in parts])
    assert isinstance(together, QuantizedWeight) and together.bits == 4
    assert torch.equal(values_of(together), torch.cat([values_of(quantize(part, 4)) for part in parts]))
    mixed = stacked([quantize(parts[0], 4), quantize(parts[1], 8)])
    assert isinstance(mixed, QuantizedWeight) and mixed.bits == 8
    torch.testing.assert_close(values_of(mixed)[8:], parts[1], atol=0.03, rtol=0)
    torch.testing.assert_close(values_of(mixed)[:8], values_of(quantize(parts[0], 4)), atol=0.03, rtol=0)
    dense = stacked([quantize(parts[0], 4), DenseWeight(parts[1])])
    assert isinstance(dense, DenseWeight) and torch.equal(dense.values[8:], parts[1])


@pytest.mark.parametrize("size", [1e-6, 0.02, 3e4])
def test_fp8_values_are_the_nearest(size):
    torch.manual_seed(0)
    values = torch.randn(9, 300) * size
    values[3] = 0
    weight = quantize_fp8(values)
    assert weight.values.dtype is torch.float8_e4m3fn and weight.scales.shape == (9, 1)
    error = (weight.dense() - values).abs()
    assert (error <= values.abs() / 16 + weight.scales * 2.0**-10).all() and not weight.dense()[3].any()
    assert (weight.dense().abs().amax(1) - values.abs().amax(1)).abs().max() <= 1e-6 * size


def test_fp8_matrices_are_joined_and_cut():
    torch.manual_seed(0)
    rows = quantize_fp8(torch.randn(8, 64))
    blocks = Fp8Weight(rows.values, torch.rand(8, 4), torch.float32)
    together = stacked([rows, blocks])
    assert isinstance(together, Fp8Weight) and together.group == 16
    assert torch.equal(together.dense(), torch.cat([rows.dense(), blocks.dense()]))
    for weight in (rows, blocks, together):
        part = columns_of(weight, range(16, 48))
        assert isinstance(part, Fp8Weight) and torch.equal(part.dense(), weight.dense()[:, 16:48])
    assert columns_of(rows, range(5, 9)).shape == (8, 4), "one scale for each output has no edges"
    with pytest.raises(ValueError, match="no whole groups"):
        columns_of(blocks, range(5, 9))
    mixed = stacked([rows, quantize(torch.randn(4, 64), 8)])
    assert isinstance(mixed, DenseWeight) and torch.equal(mixed.values[:8], rows.dense())
    assert torch.equal(rearranged(rows, lambda one: one[2:5]).dense(), rows.dense()[2:5])


@kernel
def _product(x, num_rows, weight, layer, size, own, out):
    for _ in prange(1):
        for row in range(num_rows):
            encode_row(x, row, size, weight, layer, own)
        for column in range(0, out.shape[1], 32):
            add_block(
                borrowed(own), 0, num_rows, borrowed(weight), layer, size, column, out, column, out.shape[1]
            )


@relaxed
@given(
    st.sampled_from([4, 8]),
    st.sampled_from([1, 32, 50, 96]),
    st.sampled_from([16, 80, 96, 192, 576]),
    st.integers(1, 2 * CODE_ROWS + 1),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([8, 16]),
    st.integers(0, 99),
)
def test_products(bits, outputs, inputs, num_rows, dtype, activation_bits, seed):
    """Of the second of two matrices of different formats; what is there is added to."""
    torch.manual_seed(seed)
    weights = [
        quantize(torch.randn(outputs, inputs), 12 - bits),
        quantize(torch.randn(outputs, inputs), bits),
    ]
    packed = join_codes([pack_codes(weight) for weight in weights])
    x = torch.randn(num_rows + CODE_ROWS, inputs).to(dtype)
    x[0, :16] = 0
    out = torch.randn(num_rows + CODE_ROWS, -(-outputs // 32) * 32)
    before = out.clone()
    own = make_rounded(num_rows + CODE_ROWS, inputs)
    _product(as_numpy(x), num_rows, packed, 1, inputs, own, out.numpy())
    exact = rounded(x[:num_rows], weights[1]) @ values_of(weights[1]).T
    found = (out - before)[:num_rows, :outputs]
    torch.testing.assert_close(
        found, exact, atol=(0.02 if activation_bits == 8 else 1e-4) * inputs**0.5, rtol=1e-3
    )
    assert torch.equal(out[num_rows + 1 :], before[num_rows + 1 :]), "a tile goes one row too far at most"
    chosen = torch.tensor([outputs - 1, 0, outputs // 2])
    for weight in weights:
        part = join_codes([pack_codes(weight)])
        torch.testing.assert_close(read_code_rows(part, inputs, chosen), values_of(weight)[chosen])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_stays_none(bits, value):
    """A row of a broken model must be seen, and only that row."""
    weight = quantize(torch.randn(32, 64), bits)
    x = torch.randn(3 + CODE_ROWS, 64)
    x[1, 40] = value
    out, own = torch.zeros(3 + CODE_ROWS, 32), make_rounded(3 + CODE_ROWS, 64)
    _product(as_numpy(x), 3, join_codes([pack_codes(weight)]), 0, 64, own, out.numpy())
    assert not out[1].isfinite().any() and out[[0, 2]].isfinite().all()


def test_large_matrices_are_rounded_in_parts(monkeypatch):
    values = torch.randn(50, 64)
    whole = [quantize(values, bits) for bits in (4, 8)]
    monkeypatch.setattr(weights_module, "_QUANTIZED_TOGETHER", 700)
    for before in whole:
        now = quantize(values, before.bits)
        assert torch.equal(now.codes, before.codes) and torch.equal(now.minima, before.minima)


def quantized_layers(layers: list[LayerWeights], bits: int, activation_bits: int = 16) -> list[LayerWeights]:
    def affine(of: Affine) -> Affine:
        return Affine(replace(quantize(of.weight.dense(), bits), activation_bits=activation_bits), of.bias)

    return [
        replace(layer, **{name: affine(getattr(layer, name)) for name in ("qkv", "out", "gate_up", "down")})
        for layer in layers
    ]


@settings(max_examples=30)
@given(
    st.lists(
        st.lists(st.sampled_from([0, 1, 1, 2, 3, 7, 17, 50]), min_size=3, max_size=3).filter(any),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from([4, 8]),
    st.sampled_from([8, 16]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.booleans(),
    st.integers(0, 2),
    st.integers(0, 99),
)
def test_quantized_layers(lengths, bits, activation_bits, dtype, has_bias, adapters, seed):
    """Whole steps, against the same values multiplied by what torch has; how activations are rounded is all
    that differs.
    """
    torch.manual_seed(seed)
    room = AdapterRoom(adapters, 7)
    shape = LayerShape(2, 64, 48, HeadShape(6, 2, 32), 16, 1e-5, rotary_like(400, 32), adapters=room)
    weights = quantized_layers(random_layers(shape, dtype, 0, False, has_bias), bits, activation_bits)
    compiled, composed = CompiledLayers(shape, weights), ComposedLayers(TORCH_LAYERS, shape, weights)
    give_adapters(shape, compiled, composed)
    expected = run_steps(composed, shape, lengths, 0.0, dtype)
    found = run_steps(compiled, shape, lengths, torch.nan, dtype)
    for own, right in zip(found, expected, strict=True):
        assert own.isfinite().all()
        limit = 0.03 if activation_bits == 8 or dtype is torch.bfloat16 else 2e-4
        assert (own - right).norm() < limit * right.norm()


def test_quantized_layers_take_the_phases_that_round():
    shape = LayerShape(2, 64, 48, HeadShape(6, 2, 32), 16, 1e-5, rotary_like(400, 32))
    layers = random_layers(shape, torch.float32, 0, False, False)
    for chosen, rounds in ((layers, False), (quantized_layers(layers, 8), True)):
        compiled = CompiledLayers(shape, chosen)
        run_steps(compiled, shape, [[20, 5]], 0.0, torch.float32)
        for name, ticks in zip(PHASES, compiled.ticks.T, strict=True):
            is_used = name not in ("merge", "norm, add", "adapters") and (rounds or name != "round")
            assert (ticks > 0).all() == is_used


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_embedding(bits, is_tied):
    torch.manual_seed(1)
    table, head = torch.randn(100, 96), quantize(torch.randn(100, 96), bits)
    weights = EmbeddingWeights(
        head if is_tied else DenseWeight(table), None if is_tied else head, torch.randn(96), 1e-5
    )
    expected, compiled = TorchEmbedding(weights), CompiledEmbedding(weights)
    ids = torch.randint(0, 100, (9,))
    torch.testing.assert_close(compiled.embed(ids), expected.embed(ids))
    residual = torch.randn(9, 96)
    for rows in (9, 1):
        found, right = compiled.logits(residual[:rows]), expected.logits(residual[:rows])
        assert found.shape == right.shape and (found - right).norm() < 0.02 * right.norm()


@pytest.mark.parametrize("without", ["avx512", "avx512vnni"])
def test_kernels_for_an_older_processor(without):
    """For AVX2 only, and for AVX512 without byte products."""
    layers = ["test_quantized_layers"] if without == "avx512" else []
    run_on_older_processor(__file__, ["test_products", *layers], without)


@pytest.mark.parametrize("family", ["llama-biases", "qwen3", "smollm2"])
@pytest.mark.parametrize("quantization", ["w8a16", "w8a8", "w4a16", "w4a8"])
def test_quantized_models(tmp_path, family, quantization):
    """As plain torch has it with the same codes, but for how activations are rounded."""
    write_model(tmp_path, FAMILIES[family])
    settings = {"dtype": "float32", "num_blocks": 32, "allow_logits": True}
    full, expected, own = (
        context_logprobs(LLM(str(tmp_path), **settings, quantization=each, ops=ops), PROMPT)
        for each, ops in (("none", "auto"), (quantization, "reference"), (quantization, "auto"))
    )
    assert divergence(expected, own).max() < (1e-5 if quantization.endswith("a16") else 0.1)
    assert 1e-5 < divergence(full, own).max() < (0.2 if quantization.startswith("w8") else 5)


def test_the_embedded_model_stays_close_to_full_precision():
    """On a text: the bounds of the README's table, half of which is used."""

    def read(setting: str) -> tuple[list[int], np.ndarray]:
        llm = LLM("", cache_dir=".cache", num_blocks=40, allow_logits=True, **settings_of(setting))
        ids = llm.get_tokenizer()(TEXT.read_text(encoding="utf-8")).input_ids[:WINDOW]
        return ids, context_logprobs(llm, ids)

    ids, full = read("none")
    following = np.arange(len(ids) - 1), ids[1:]
    for setting, bound in (("w4a16", 0.003), ("w8a8", 0.012), ("w4a8+kv-int8", 0.012)):
        _, own = read(setting)
        assert 1e-5 < divergence(full, own).mean() < bound
        assert own[following].mean() > full[following].mean() - 0.03, "perplexity grows by 3 % at most"


def test_quantized_weights_are_kept_apart(tmp_path):
    folder = tmp_path / "models" / "small"
    write_model(folder, FAMILIES["llama2"])
    params = SamplingParams(temperature=0, max_tokens=8)
    first = {}
    for _ in range(2):
        for quantization in ("none", "w8a16", "w4a8"):
            llm = LLM(str(folder), cache_dir=str(tmp_path), num_blocks=32, quantization=quantization)
            tokens = llm.generate([[11, 60, 7]], params)[0].outputs[0].token_ids
            assert first.setdefault(quantization, tokens) == tokens
    kept = [path.name.rpartition("-")[0] for path in folder.glob("packed-*") if path.is_dir()]
    assert sorted(kept) == sorted(
        f"packed-{part}-bfloat16{form}" for part in ("head", "layers") for form in ("", "_w4a8", "_w8a16")
    )


def test_sizes_that_cannot_be_quantized_are_refused(tmp_path):
    write_model(tmp_path, FAMILIES["sizes that no kernel takes"])
    with pytest.raises(UnsupportedModelError, match="q_proj cannot be quantized: a matrix with 60 inputs"):
        LLM(str(tmp_path), num_blocks=32, quantization="w8a16")


def test_what_is_no_quantization_is_refused():
    with pytest.raises(SettingsError, match="quantization"):
        LLM("", quantization="w3a16")
