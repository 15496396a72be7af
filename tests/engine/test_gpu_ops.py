"""Each kernel in the Triton language against its torch reference, with poisoned outputs: on a GPU where there
is one, and in the language's interpreter elsewhere.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from cases import capped_shape, random_rows, rotary_like
from gpu_cases import check_layers
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import DEVICE, DTYPES, HAS_GPU
from pagetide.ops import reference
from pagetide.ops.adapters import AdapterRoom
from pagetide.ops.attention import HeadShape
from pagetide.ops.gpu import decode
from pagetide.ops.gpu.activation import gated
from pagetide.ops.gpu.choices import Choices
from pagetide.ops.gpu.copies import copy_blocks
from pagetide.ops.gpu.embedding import GpuEmbedding
from pagetide.ops.gpu.gather import gather
from pagetide.ops.gpu.logits import Penalties, edit, mask
from pagetide.ops.gpu.norm import add_rms_norm
from pagetide.ops.gpu.sampling import argmax, sample
from pagetide.ops.layers import EmbeddingWeights, LayerShape
from pagetide.ops.plain import TorchEmbedding
from pagetide.ops.weights import DenseWeight, quantize
from pagetide.runner.plan import Admission, LogitEdit, RowEdits, RowParams, bits_of
from pagetide.runner.rows import Rows

TOLERANCES = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
few = settings(max_examples=25 if HAS_GPU else 12)
dtypes = st.sampled_from(DTYPES)


def close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(found.float(), expected.float(), atol=tolerance, rtol=tolerance)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape).to(DEVICE, dtype)


@few
@given(st.integers(1, 5), st.sampled_from([1, 60, 96, 1024, 2048, 3000]), dtypes, st.booleans())
def test_norm(tokens, size, dtype, adds):
    x, residual, weight = (
        random(tokens, size, dtype=dtype), random(tokens, size, dtype=dtype) * 5, random(size, dtype=dtype)
    )  # fmt: skip
    expected_residual = residual.clone()
    if adds:
        expected = reference.add_rms_norm(x, expected_residual, weight, 1e-5)
    else:
        expected = reference.rms_norm(residual, weight, 1e-5)
    close(add_rms_norm(x if adds else None, residual, weight, 1e-5), expected, dtype)
    assert torch.equal(residual, expected_residual)


@few
@given(st.integers(1, 5), st.sampled_from([1, 48, 1024, 3000]), dtypes, st.sampled_from(["silu", "gelu"]))
def test_gated(tokens, size, dtype, activation):
    gate_up = random(tokens, 2 * size, dtype=dtype) * 3
    close(gated(gate_up, activation), reference.gated(gate_up, activation), dtype)


@few
@given(
    st.lists(st.tuples(st.integers(0, 300), st.integers(1, 40)), min_size=1, max_size=6),
    st.sampled_from([4, 16]),
    st.integers(0, 99),
)
def test_gather(sequences, block_size, seed):
    """Some rows are padding."""
    rng = np.random.default_rng(seed)
    starts, counts = (np.array(values, np.int32) for values in zip(*sequences, strict=True))
    history = torch.from_numpy(rng.integers(0, 1000, (9, 401))).to(DEVICE)
    table = torch.from_numpy(rng.integers(0, 50, (9, 101)).astype(np.int32)).to(DEVICE)
    rows = rng.permutation(9)[: len(counts)].astype(np.int32)
    lengths = np.full(9, 77, np.int32)
    lengths[rows] = starts
    is_padding = rng.random(len(rows)) < 0.3
    tensors = [torch.from_numpy(array).to(DEVICE) for array in (lengths, rows, counts)]
    expected = reference.gather(
        history, table, tensors[0].clone(), tensors[1], tensors[2], int(counts.sum()), block_size
    )
    growing = tensors[0].clone()
    padded = torch.from_numpy(np.where(is_padding, -1, rows).astype(np.int32)).to(DEVICE)
    ids, positions, slots, tables, ends = gather(
        history, table, growing, padded, tensors[2], int(counts.sum()), block_size
    )
    of_padding = torch.from_numpy(np.repeat(is_padding, counts)).to(DEVICE)
    assert torch.equal(ids, expected[0].masked_fill(of_padding, 0))
    assert torch.equal(positions, expected[1].masked_fill(of_padding, 0))
    assert torch.equal(slots, expected[2].masked_fill(of_padding, -1))
    for i, row in enumerate(rows):
        end = 0 if is_padding[i] else starts[i] + counts[i]
        assert ends[i] == end and growing[row] == (starts[i] if is_padding[i] else end)
        used = -(-end // block_size)
        assert torch.equal(tables[i, :used], table[row, :used])


HEADS = [(4, 4, 16), (4, 2, 8), (6, 2, 32), (9, 3, 64), (7, 1, 80), (2, 1, 128), (32, 1, 16)]


@settings(max_examples=40 if HAS_GPU else 8)
@given(
    st.lists(
        st.lists(st.sampled_from([0, 1, 1, 1, 2, 3, 7, 16, 17, 50]), min_size=3, max_size=3).filter(any),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from(HEADS),
    st.sampled_from([16, 8]),
    dtypes,
    st.sampled_from([0, 5, 33]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2),
    st.integers(0, 99),
)
def test_layers(
    lengths, heads, block_size, dtype, window, has_norms, has_bias, has_fp8, is_capped, adapters, seed
):
    """Whole steps through two layers, prompts in chunks and single tokens mixed; what is read of the cache
    must have been written.
    """
    torch.manual_seed(seed)
    shape = LayerShape(2, 64, 48, HeadShape(*heads), block_size, 1e-5, rotary_like(400, heads[2]))
    shape = replace(capped_shape(shape) if is_capped else shape, adapters=AdapterRoom(adapters, 7))
    check_layers(shape, lengths, dtype, window, has_norms, has_bias, has_fp8)


@pytest.mark.parametrize("window", [0, 270])
@pytest.mark.parametrize("dtype", DTYPES if HAS_GPU else DTYPES[:1])
def test_long_contexts_are_split_and_joined(window, dtype, monkeypatch):
    """Into so many parts that joining takes several rounds."""
    monkeypatch.setattr(decode, "MIN_TILES", 1)
    monkeypatch.setattr(decode, "_JOINED", 2)
    torch.manual_seed(0)
    heads = HeadShape(6, 2, 32)
    shape = LayerShape(2, 64, 48, heads, 16, 1e-5, rotary_like(3000, 32))
    assert decode.splits_of(2 * heads.num_kv_heads, 3000, DEVICE) > 3
    long = 2500 if HAS_GPU else 290
    check_layers(shape, [[long, 5], [1, 1], [1, 0], [0, 1]], dtype, window, False, False)


@few
@given(
    st.integers(1, 9),
    st.sampled_from([5, 100]),
    st.sampled_from([32, 96]),
    dtypes,
    st.booleans(),
    st.sampled_from([0, 4, 8]),
)
def test_embedding(tokens, vocabulary, hidden, dtype, is_tied, bits):
    form = partial(quantize, bits=bits) if bits else DenseWeight
    matrices = [form(random(vocabulary, hidden, dtype=dtype)) for _ in range(1 if is_tied else 2)]
    weights = EmbeddingWeights(
        matrices[0],
        None if is_tied else matrices[1],
        random(hidden, dtype=dtype),
        1e-5,
    )
    expected, own = TorchEmbedding(weights), GpuEmbedding(Choices(), dtype, weights)
    ids = torch.randint(0, vocabulary, (tokens,), device=DEVICE)
    assert torch.equal(own.embed(ids), expected.embed(ids))
    residual = random(tokens, hidden, dtype=dtype)
    logits = own.logits(residual)
    assert logits.dtype is torch.float32
    close(logits / 10, expected.logits(residual) / 10, dtype)


@settings(max_examples=200 if HAS_GPU else 25)
@given(st.sampled_from([2, 300, 4096, 9000]), st.sampled_from([0.5, 3.0]), st.integers(0, 2**63 - 1))
def test_sampling(vocabulary, spread, seed):
    """Rows with all kinds of rules."""
    rows = 6
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocabulary, generator=generator) * spread
    if seed % 2:
        logits = logits.mul(8).round().div(8)  # with many ties
    # As masks leave them; at least one token is always allowed.
    is_masked = torch.rand(rows, vocabulary - 1, generator=generator) < 0.2
    logits[:, 1:] = logits[:, 1:].masked_fill(is_masked, -torch.inf)

    def chosen(*values: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.from_numpy(rng.choice(values, rows)).to(dtype)

    arguments = (
        chosen(0.0, 0.3, 0.7, 1.0, 3.0),
        chosen(0, 0, 1, 5, 20, 1000, 5000, 100_000, dtype=torch.int64),
        chosen(1.0, 1.0, 0.95, 0.8, 0.5, 0.01, 0.0),
        chosen(0.0, 0.0, 0.02, 0.05, 0.9),
        torch.from_numpy(rng.integers(-(2**63), 2**63, rows)),
        torch.from_numpy(rng.integers(0, 2**31, rows)).int(),  # as a plan's positions are
    )
    found = sample(logits.to(DEVICE), *(argument.to(DEVICE) for argument in arguments))
    expected = reference.sample(logits, *arguments)
    # A sum in another order may put a token at top_p's border on its other side.
    assert (found.cpu() != expected).sum() <= (vocabulary > 1000)
    assert argmax(logits.to(DEVICE)).tolist() == logits.argmax(-1).tolist()


def test_noise_of_many_tokens_is_the_references():
    """Each row's token is the largest of 300,000 numbers of noise: those near 1, where a fast logarithm is
    wrong.
    """
    rows, vocabulary = (64, 300_000) if HAS_GPU else (2, 70_000)
    ones, nothing = torch.ones(rows, device=DEVICE), torch.zeros(rows, dtype=torch.int64, device=DEVICE)
    arguments = (
        ones, nothing, ones, ones * 0, torch.arange(rows, device=DEVICE) * 2**40,
        torch.arange(rows, device=DEVICE),
    )  # fmt: skip
    logits = torch.zeros(rows, vocabulary, device=DEVICE)
    assert sample(logits, *arguments).tolist() == reference.sample(logits, *arguments).tolist()


def test_rows_without_a_finite_logit_have_no_token():
    logits = torch.zeros(4, 5000)
    logits[0, 4321], logits[1, 7], logits[2] = torch.nan, torch.inf, -torch.inf
    for temperature in (0.0, 1.0):
        rules = [torch.full((4,), value) for value in (temperature, 0, 0.9, 0.0, 1, 1)]
        for index in (1, 4, 5):
            rules[index] = rules[index].long()
        found = sample(logits.to(DEVICE), *(rule.to(DEVICE) for rule in rules))
        assert found.tolist()[:3] == [-1, -1, -1] and found[3] >= 0
    assert argmax(logits.to(DEVICE)).tolist() == [-1, -1, -1, 0]


@few
@given(st.integers(1, 6), st.integers(2, 60), st.integers(0, 1000))
def test_penalties(num_rows, vocabulary, seed):
    rng = np.random.default_rng(seed)
    history, rows, positions, num_prompt = (
        tensor.to(DEVICE) for tensor in random_rows(rng, num_rows, vocabulary)
    )
    penalize = Penalties()
    for _ in range(2):  # what one call counts must be gone before the next
        logits = random(num_rows, vocabulary) * 3
        rules = [
            torch.from_numpy(rng.choice(values, num_rows).astype(np.float32)).to(DEVICE)
            for values in ([1, 0.5, 2], [0, -1, 1.5], [0, 0.7, -2])
        ]
        expected, found = logits.clone(), logits.clone()
        reference.penalize(expected, history, rows, positions, num_prompt, *rules)
        penalize(found, history, rows, positions.int(), num_prompt, *rules)
        torch.testing.assert_close(found, expected)


@few
@given(
    st.lists(
        st.lists(
            st.tuples(
                st.integers(0, 7),
                st.floats(-3, 3, width=16),
                st.integers(0, 50),
                st.lists(st.integers(0, 3), max_size=2),
            ),
            max_size=5,
        ),
        min_size=1,
        max_size=5,
    ),
    st.integers(0, 99),
)
def test_edits(edits, seed):
    rng = np.random.default_rng(seed)
    state = Rows(len(edits), 40, 16, 8, DEVICE)
    state.history[:-1, :40] = torch.from_numpy(rng.integers(0, 4, (len(edits), 40))).to(DEVICE)
    for row, its_edits in enumerate(edits):
        params = RowParams(
            edits=RowEdits.of([LogitEdit(t, b, below, tuple(p)) for t, b, below, p in its_edits])
        )
        state._write_edits((Admission(row, 0, np.zeros(1, np.int32), params),))
    rows = torch.from_numpy(rng.permutation(len(edits)).astype(np.int32)).to(DEVICE)
    positions = torch.from_numpy(rng.integers(1, 40, len(edits)).astype(np.int32)).to(DEVICE)
    num_prompt = torch.from_numpy(rng.integers(0, 4, len(edits))).to(DEVICE)
    logits = random(len(edits), 8)
    expected, found = logits.clone(), logits.clone()
    reference.edit(expected, state.history, rows, positions, num_prompt, state.edits)
    edit(found, state.history, rows, positions, num_prompt, state.edits)
    torch.testing.assert_close(found, expected)


@few
@given(st.integers(1, 4), st.sampled_from([(2, 1, 4, 8), (2, 3, 16, 16), (5, 7)]), dtypes, st.integers(0, 99))
def test_copies_of_blocks(layers, block_shape, dtype, seed):
    """Within a pool, to the host's memory, and back."""
    rng = np.random.default_rng(seed)
    pool, host = (
        random(layers, 9, *block_shape, dtype=dtype),
        torch.zeros(layers, 6, *block_shape, dtype=dtype),
    )
    host = host.pin_memory() if HAS_GPU else host
    for source, target in ((pool, pool), (pool, host), (host, pool)):
        order = rng.permutation(min(len(source[0]), len(target[0])))
        pairs = torch.from_numpy(np.stack([order[:2], order[2:4]], axis=1).astype(np.int32))
        expected = target.clone()
        reference.copy_blocks(source.to(target.device), expected, pairs)
        copy_blocks(source, target, pairs.to(DEVICE))
        if HAS_GPU:
            torch.cuda.synchronize()
        assert torch.equal(target, expected)


@few
@given(st.integers(1, 4), st.sampled_from([31, 32, 1500]), st.integers(0, 99))
def test_masks(count, vocabulary, seed):
    rng = np.random.default_rng(seed)
    masks = torch.from_numpy(
        np.stack([bits_of(np.flatnonzero(rng.random(vocabulary) < 0.5), vocabulary) for _ in range(6)])
    ).to(DEVICE)
    is_masked = torch.from_numpy(rng.random(6) < 0.7).to(DEVICE)
    rows = torch.from_numpy(rng.permutation(6)[:count].astype(np.int32)).to(DEVICE)
    logits = random(count, vocabulary)
    expected, found = logits.clone(), logits.clone()
    reference.mask(expected, masks, is_masked, rows)
    mask(found, masks, is_masked, rows)
    assert torch.equal(found, expected)
