"""Each CPU kernel against its torch reference, over random shapes, with poisoned outputs, in both storage types."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pagetide.kv_cache.layout import keys_of, values_of
from pagetide.ops import reference
from pagetide.ops.attention import HeadShape, LayerAttention, TorchAttention
from pagetide.ops.batch import Batch
from pagetide.ops.cpu.activation import silu_mul
from pagetide.ops.cpu.attention import NumbaAttention, spread
from pagetide.ops.cpu.compiled import as_numpy
from pagetide.ops.cpu.logits import edit, mask, penalize
from pagetide.ops.cpu.matmul import matmul
from pagetide.ops.cpu.norm import add_rms_norm
from pagetide.ops.cpu.sampling import argmax, sample, score
from pagetide.ops.cpu.table import TIMED_ROWS, MatmulTimings, candidates, make_matmul
from pagetide.runner.plan import Admission, LogitEdit, RowParams, bits_of
from pagetide.runner.rows import Rows

dtypes = st.sampled_from([torch.float32, torch.bfloat16])
relaxed = settings(max_examples=40, deadline=None)


def poisoned(*shape: int) -> torch.Tensor:
    return torch.full(shape, torch.nan)


@relaxed
@given(st.integers(1, 9), st.integers(1, 70), st.integers(1, 90), dtypes, st.integers(0, 99))
def test_matmul(m, n, k, dtype, seed):
    torch.manual_seed(seed)
    x, weight, out = torch.randn(m, k), torch.randn(n, k).to(dtype), poisoned(m, n)
    matmul(x.numpy(), as_numpy(weight), out.numpy())
    torch.testing.assert_close(out, x @ weight.float().T, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_candidate_computes_the_same(dtype):
    torch.manual_seed(0)
    weight, x = torch.randn(40, 64).to(dtype), torch.randn(5, 64)
    for name, way in candidates(weight).items():
        tolerance = 0.15 if name == "bfloat16" else 1e-4
        torch.testing.assert_close(way(x), x @ weight.float().T, atol=tolerance, rtol=tolerance, msg=name)


def test_the_timed_winners_are_kept_on_disk_and_used(tmp_path):
    weight, bias = torch.randn(8, 16), torch.randn(8)
    product = make_matmul(weight, bias, MatmulTimings(tmp_path / "matmul.json"))
    for rows in (1, 3, 300):
        x = torch.randn(rows, 16)
        torch.testing.assert_close(product(x), x @ weight.T + bias, atol=1e-4, rtol=1e-4)
    kept = MatmulTimings(tmp_path / "matmul.json").winners(weight)
    assert len(kept) == len(TIMED_ROWS) and set(kept) <= set(candidates(weight))


@relaxed
@given(st.integers(1, 5), st.integers(1, 80), st.integers(0, 99))
def test_norm_and_activation(tokens, size, seed):
    torch.manual_seed(seed)
    x, residual, weight = torch.randn(tokens, size), torch.randn(tokens, size), torch.randn(size)
    expected_residual = residual.clone()
    expected = reference.add_rms_norm(x, expected_residual, weight, 1e-5)
    torch.testing.assert_close(add_rms_norm(x, residual, weight, 1e-5), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(residual, expected_residual)
    gate_up = torch.randn(tokens, 2 * size)
    torch.testing.assert_close(silu_mul(gate_up), reference.silu_mul(gate_up), atol=1e-5, rtol=1e-4)


@relaxed
@given(
    st.lists(st.tuples(st.integers(0, 70), st.sampled_from([1, 1, 1, 2, 15, 16, 17, 40, 70])), min_size=1, max_size=6),
    st.sampled_from([(4, 4, 8), (6, 2, 16), (9, 3, 64), (3, 1, 20)]),
    st.sampled_from([4, 16, 6]),
    dtypes,
    st.sampled_from([0, 5, 33]),
    st.booleans(),
    st.integers(0, 99),
)
def test_attention(sequences, shape, block_size, dtype, window, has_norm, seed):
    """Random lengths and block tables; the cache outside the sequences is poisoned, and so are tokens that no one may see."""
    torch.manual_seed(seed)
    heads = HeadShape(*shape)
    starts, counts = (np.array(values, np.int32) for values in zip(*sequences, strict=True))
    longest = -(-int((starts + counts).max()) // block_size)
    num_blocks = longest * len(sequences)
    table = torch.randperm(num_blocks).to(torch.int32).reshape(len(sequences), longest)
    kv = torch.full((num_blocks, 2, heads.num_kv_heads, block_size * heads.head_dim), torch.nan, dtype=dtype)
    for row, start in zip(table, starts, strict=True):
        for position in range(start):
            block, offset = row[position // block_size].long(), position % block_size
            keys_of(kv, heads.head_dim)[block, :, :, offset] = torch.randn(heads.num_kv_heads, heads.head_dim).to(dtype)
            values_of(kv, heads.head_dim)[block, :, offset] = torch.randn(heads.num_kv_heads, heads.head_dim).to(dtype)
    positions = torch.cat([torch.arange(s, s + c) for s, c in zip(starts, counts, strict=True)])
    owner = torch.repeat_interleave(torch.arange(len(sequences)), torch.tensor(counts))
    slots = table[owner, positions // block_size].long() * block_size + positions % block_size
    norms = (torch.randn(heads.head_dim), torch.randn(heads.head_dim)) if has_norm else (None, None)
    layer = LayerAttention(torch.randn(200, heads.head_dim), window, *norms, eps=1e-5)
    qkv = torch.randn(len(positions), (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim)
    results = []
    for backend in (TorchAttention(heads), NumbaAttention(heads)):
        batch = Batch(positions, positions, slots, table, positions, counts, starts)
        own = kv.clone()
        batch.attention = backend.plan(batch)
        q = backend.write(qkv, own, layer, batch)
        # torch's masked softmax cannot look past NaN in values that it multiplies by zero; the kernel never reads them.
        readable = own.nan_to_num(0) if isinstance(backend, TorchAttention) or (counts > 64).any() else own
        results.append((q, own, backend.attend(q, readable, layer, batch)))
    (q, cache, out), (own_q, own_cache, own_out) = results
    torch.testing.assert_close(own_q, q, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(own_cache, cache, atol=1e-2, rtol=1e-2, equal_nan=True)
    torch.testing.assert_close(own_out, out, atol=2e-2 if dtype is torch.bfloat16 else 2e-4, rtol=1e-2)


def test_tasks_are_spread_so_that_both_halves_cost_about_the_same():
    cost = np.array([100, 1, 1, 90, 1, 1, 1, 1])
    order = spread(np.arange(8).reshape(-1, 1), cost).ravel()
    assert sorted(order) == list(range(8))
    assert abs(int(cost[order[:4]].sum()) - int(cost[order[4:]].sum())) <= 12


@relaxed
@given(
    st.integers(1, 6),
    st.integers(2, 300),
    st.sampled_from([0.0, 0.3, 1.0, 3.0]),
    st.sampled_from([0, 1, 5, 1000]),
    st.sampled_from([1.0, 0.9, 0.5, 0.01]),
    st.sampled_from([0.0, 0.05, 0.9]),
    st.integers(0, 2**63 - 1),
)
def test_sampling(rows, vocabulary, temperature, top_k, top_p, min_p, seed):
    torch.manual_seed(seed % 1000)
    logits = torch.randn(rows, vocabulary) * 3
    # As masks leave them; at least one token is always allowed.
    logits[:, 1:] = logits[:, 1:].masked_fill(torch.rand(rows, vocabulary - 1) < 0.2, -torch.inf)

    def full(value, dtype=torch.float32):
        return torch.full((rows,), value, dtype=dtype)

    arguments = (full(temperature), full(top_k, torch.int64), full(top_p), full(min_p), full(seed, torch.int64), torch.arange(rows))
    assert sample(logits, *arguments).tolist() == reference.sample(logits, *arguments).tolist()
    assert argmax(logits).tolist() == logits.argmax(-1).tolist()


def random_rows(rng: np.random.Generator, num_rows: int, vocabulary: int) -> tuple[torch.Tensor, ...]:
    """history of more rows than are looked at, the rows, their lengths, and how much of that is prompt; what lies behind is poison."""
    history = torch.from_numpy(rng.integers(0, vocabulary, (num_rows + 3, 40)))
    rows = torch.from_numpy(rng.permutation(num_rows + 3)[:num_rows].copy())
    positions = torch.from_numpy(rng.integers(1, 40, num_rows))
    num_prompt = torch.from_numpy(rng.integers(1, positions.numpy() + 1))
    for row, position in zip(rows.tolist(), positions.tolist(), strict=True):
        history[row, position:] = vocabulary - 1
    return history, rows, positions, num_prompt


@relaxed
@given(st.integers(1, 6), st.integers(2, 60), st.integers(0, 1000))
def test_penalties(num_rows, vocabulary, seed):
    rng = np.random.default_rng(seed)
    history, rows, positions, num_prompt = random_rows(rng, num_rows, vocabulary)
    logits = torch.from_numpy(rng.normal(size=(num_rows, vocabulary)).astype(np.float32)) * 3
    settings = [torch.from_numpy(rng.choice(values, num_rows).astype(np.float32)) for values in ([1, 0.5, 2], [0, -1, 1.5], [0, 0.7, -2])]
    expected, found = logits.clone(), logits.clone()
    reference.penalize(expected, history, rows, positions, num_prompt, *settings)
    penalize(found, history, rows, positions, num_prompt, *settings)
    torch.testing.assert_close(found, expected)
    for i in range(num_rows):
        tokens = history[rows[i], : positions[i]].tolist()
        answer = tokens[num_prompt[i] :]
        for token in range(vocabulary):
            value = logits[i, token].item()
            if token in tokens:
                value = value / settings[0][i].item() if value > 0 else value * settings[0][i].item()
            value -= settings[1][i].item() * (token in answer) + settings[2][i].item() * answer.count(token)
            assert expected[i, token].item() == pytest.approx(value, abs=1e-4)


@relaxed
@given(st.integers(1, 5), st.integers(4, 20), st.integers(0, 1000))
def test_edits_apply_where_position_and_prefix_say_so(num_rows, vocabulary, seed):
    rng = np.random.default_rng(seed)
    history, rows, positions, num_prompt = random_rows(rng, num_rows, vocabulary)
    edits = [[] for _ in range(len(history))]
    for row in range(len(history)):
        for _ in range(rng.integers(0, 5)):
            # Half of the prefixes are what the row ends with.
            length, own = int(rng.integers(0, 4)), positions[rows == row]
            prefix = tuple(rng.integers(0, vocabulary, length).tolist())
            if len(own) and rng.random() < 0.5:
                prefix = tuple(history[row, max(0, int(own[0]) - length) : int(own[0])].tolist())
            edits[row].append(LogitEdit(int(rng.integers(0, vocabulary)), float(rng.choice([-np.inf, 1.5, -2])), int(rng.integers(0, 60)), prefix))
    state = Rows(len(history), 40, 16, vocabulary, torch.device("cpu"))
    admissions = tuple(Admission(row, np.zeros(1, np.int32), RowParams(edits=tuple(own))) for row, own in enumerate(edits))
    state._write_edits(admissions)
    logits = torch.zeros(num_rows, vocabulary)
    expected, found = logits.clone(), logits.clone()
    reference.edit(expected, history, rows, positions, num_prompt, state.edits)
    edit(found, history, rows, positions, num_prompt, state.edits)
    torch.testing.assert_close(found, expected)
    for i, (row, position) in enumerate(zip(rows.tolist(), positions.tolist(), strict=True)):
        answer = history[row, num_prompt[i] : position].tolist()
        values = [0.0] * vocabulary
        for one in edits[row]:
            if position < one.below and tuple(answer[len(answer) - len(one.prefix) :]) == one.prefix:
                values[one.token] += one.bias
        assert expected[i].tolist() == values


@relaxed
@given(st.integers(1, 5), st.integers(1, 100), st.integers(0, 1000))
def test_masks_leave_only_the_tokens_whose_bits_are_set(num_rows, vocabulary, seed):
    rng = np.random.default_rng(seed)
    allowed = [np.flatnonzero(rng.random(vocabulary) < 0.4).tolist() for _ in range(num_rows + 2)]
    masks = torch.from_numpy(np.array([bits_of(tokens, vocabulary) for tokens in allowed]))
    is_masked = torch.from_numpy(rng.random(num_rows + 2) < 0.6)
    rows = torch.from_numpy(rng.permutation(num_rows + 2)[:num_rows].copy())
    for function in (reference.mask, mask):
        logits = torch.zeros(num_rows, vocabulary)
        function(logits, masks, is_masked, rows)
        for i, row in enumerate(rows.tolist()):
            left = torch.isfinite(logits[i]).nonzero().flatten().tolist()
            assert left == (allowed[row] if is_masked[row] else list(range(vocabulary)))


@pytest.mark.parametrize("score", [reference.score, score])
@pytest.mark.parametrize("spread", [0.01, 3, 300])
def test_scores_are_log_softmax_and_ranks_begin_at_one(score, spread):
    logits = torch.randn(4, 30) * spread
    logits[2, 7] = -torch.inf
    ids = torch.tensor([0, 5, 29, int(logits[3].argmax())])
    logprobs, ranks, top_ids, top_logprobs = score(logits, ids, 3)
    assert score(logits, ids, 0)[2].shape == (4, 0)
    expected = logits.log_softmax(-1)
    torch.testing.assert_close(logprobs, expected.gather(1, ids[:, None]).squeeze(1), atol=1e-4, rtol=1e-4)
    assert ranks.tolist() == [int((row > row[i]).sum()) + 1 for row, i in zip(expected, ids, strict=True)]
    torch.testing.assert_close(top_logprobs, expected.topk(3).values, atol=1e-4, rtol=1e-4)
    assert top_ids.tolist() == expected.topk(3).indices.tolist()


@pytest.mark.parametrize("draw", [reference.sample, sample])
def test_sampled_frequencies_follow_the_distribution(draw):
    """20,000 draws of one distribution with top-k 4 and top-p 0.9: chi-squared within its 1e-6 quantile, and nothing outside the set."""
    logits = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.0, -1.0])
    num = 20_000

    def full(value, dtype=torch.float32):
        return torch.full((num,), value, dtype=dtype)

    ids = draw(logits.repeat(num, 1), full(1.0), full(4, torch.int64), full(0.9), full(0.0), full(9, torch.int64), torch.arange(num))
    kept = torch.tensor([2.0, 1.5, 1.0, 0.5]).softmax(0)
    inside = int((kept.cumsum(0) - kept < 0.9).sum())
    expected = kept[:inside] / kept[:inside].sum() * num
    counts = torch.bincount(ids, minlength=6).float()
    assert counts[inside:].sum() == 0
    assert ((counts[:inside] - expected) ** 2 / expected).sum() < 31


def test_noise_depends_on_seed_and_position_only():
    logits = torch.zeros(3, 100)
    one = torch.ones(3)

    def draw(seeds, positions):
        return sample(logits, one, torch.zeros(3, dtype=torch.int64), one, 0 * one, torch.tensor(seeds), torch.tensor(positions)).tolist()

    a = draw([1, 2, 3], [5, 5, 5])
    assert draw([3, 1, 2], [5, 5, 5]) == [a[2], a[0], a[1]]
    assert draw([1, 1, 1], [5, 6, 7]) != [a[0]] * 3
