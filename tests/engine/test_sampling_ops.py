"""What makes tokens of logits on a CPU: edits, penalties, masks, sampling and log-probabilities, each kernel
against its torch reference.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from cases import random_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from pagetide.ops import reference
from pagetide.ops.cpu.logits import edit, mask, penalize
from pagetide.ops.cpu.sampling import _noise, argmax, sample, score
from pagetide.runner.plan import Admission, LogitEdit, RowEdits, RowParams, bits_of
from pagetide.runner.rows import Rows

relaxed = settings(max_examples=40)


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

    arguments = (
        full(temperature),
        full(top_k, torch.int64),
        full(top_p),
        full(min_p),
        full(seed, torch.int64),
        torch.arange(rows, dtype=torch.int32),  # as a plan's positions are
    )
    assert sample(logits, *arguments).tolist() == reference.sample(logits, *arguments).tolist()
    assert argmax(logits).tolist() == logits.argmax(-1).tolist()


@relaxed
@given(st.integers(1, 6), st.integers(2, 60), st.integers(0, 1000))
def test_penalties(num_rows, vocabulary, seed):
    rng = np.random.default_rng(seed)
    history, rows, positions, num_prompt = random_rows(rng, num_rows, vocabulary)
    logits = torch.from_numpy(rng.normal(size=(num_rows, vocabulary)).astype(np.float32)) * 3
    settings = [
        torch.from_numpy(rng.choice(values, num_rows).astype(np.float32))
        for values in ([1, 0.5, 2], [0, -1, 1.5], [0, 0.7, -2])
    ]
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
            edits[row].append(
                LogitEdit(
                    int(rng.integers(0, vocabulary)),
                    float(rng.choice([-np.inf, 1.5, -2])),
                    int(rng.integers(0, 60)),
                    prefix,
                )
            )
    state = Rows(len(history), 40, 16, vocabulary, torch.device("cpu"))
    admissions = tuple(
        Admission(row, 0, np.zeros(1, np.int32), RowParams(edits=RowEdits.of(own)))
        for row, own in enumerate(edits)
    )
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


@relaxed
@given(
    st.sampled_from([1000, 5000, 49_152]),
    st.sampled_from([0.01, 1.0, 4.0, 100.0]),
    st.booleans(),
    st.sampled_from([0, 1, 3, 50, 700, 4000]),
    st.sampled_from([1.0, 0.95, 0.3]),
    st.sampled_from([0.0, 0.02]),
    st.integers(0, 999),
)
def test_sampling_and_scores_of_large_vocabularies(vocabulary, spread, has_ties, top_k, top_p, min_p, seed):
    """Flat and peaked distributions, with many equal logits and without."""
    torch.manual_seed(seed)
    logits = torch.randn(2, vocabulary) * spread
    if has_ties:
        logits = (logits * 2 / spread).round() * spread / 2
    logits[0, torch.rand(vocabulary) < 0.3] = -torch.inf
    columns = (torch.full((2,), value) for value in (1.0, top_k, top_p, min_p, seed))
    arguments = (*columns, torch.arange(2))
    assert sample(logits, *arguments).tolist() == reference.sample(logits, *arguments).tolist()
    ids = torch.tensor([int(logits[0].argmax()), seed])
    for own, right in zip(score(logits, ids, 20), reference.score(logits, ids, 20), strict=True):
        if own.dtype is torch.float32:
            torch.testing.assert_close(own, right, atol=2e-4, rtol=2e-4)
        elif own.ndim == 1:
            assert own.tolist() == right.tolist()
        else:  # two of so many random numbers may be equal, and then their order is nobody's
            assert torch.equal(logits.gather(1, own), logits.gather(1, right))
            assert all(len(set(row)) == len(row) for row in own.tolist())


@pytest.mark.parametrize("top_p", [1.0, 0.001])
def test_any_token_may_win_where_all_are_alike(top_p):
    """The noise decides alone, and with a small top-p most draws are repeated many times."""
    rows, vocabulary = 16, 49_152
    logits = torch.randn(rows, vocabulary) * 0.01
    ones = torch.ones(rows)
    columns = (ones, 0 * ones.long(), top_p * ones, 0 * ones, torch.arange(rows), torch.arange(rows))
    assert sample(logits, *columns).tolist() == reference.sample(logits, *columns).tolist()


@pytest.mark.parametrize(("seed", "token"), [(2479, 617), (4017, 248), (6028, 91)])
def test_the_least_likely_token_wins_by_the_largest_noise(seed, token):
    """These have noise beyond 15 at position 5; their neighbour is as much likelier, or nearly."""
    rows = 80
    logits = torch.full((rows, 1024), -200.0)
    logits[:, token + 1], ones = 0.0, torch.ones(rows)
    logits[:, token] = torch.linspace(-17.0, -13.0, rows)
    columns = (ones, 0 * ones.long(), ones, 0 * ones, seed * ones.long(), 5 * ones.long())
    found = sample(logits, *columns).tolist()
    assert found == reference.sample(logits, *columns).tolist() and {token, token + 1} == set(found)


def test_rows_that_are_no_piece_of_memory_are_not_taken():
    with pytest.raises(AssertionError):
        argmax(torch.randn(64, 8).t())


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
    """20,000 draws of one distribution with top-k 4 and top-p 0.9: chi-squared within its 1e-6 quantile,
    and nothing outside the set.
    """
    logits = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.0, -1.0])
    num = 20_000

    def full(value, dtype=torch.float32):
        return torch.full((num,), value, dtype=dtype)

    ids = draw(
        logits.repeat(num, 1),
        full(1.0),
        full(4, torch.int64),
        full(0.9),
        full(0.0),
        full(9, torch.int64),
        torch.arange(num),
    )
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
        return sample(
            logits,
            one,
            torch.zeros(3, dtype=torch.int64),
            one,
            0 * one,
            torch.tensor(seeds),
            torch.tensor(positions),
        ).tolist()

    a = draw([1, 2, 3], [5, 5, 5])
    assert draw([3, 1, 2], [5, 5, 5]) == [a[2], a[0], a[1]]
    assert draw([1, 1, 1], [5, 6, 7]) != [a[0]] * 3


_LARGEST = float(np.finfo(np.float32).max)


@relaxed
@given(
    st.lists(
        st.sampled_from([-_LARGEST, -1.5, -0.0, 0.0, 1e-45, -1e-45, 1.5, _LARGEST, -math.inf])
        | st.floats(width=32, allow_nan=False, allow_infinity=False),
        min_size=1,
        max_size=200,
    )
)
def test_argmax_takes_the_first_of_the_largest_whatever_their_signs(values):
    logits = torch.tensor([values])
    expected = int(logits.argmax()) if max(values) > -math.inf else -1
    assert argmax(logits).tolist() == [expected]


@pytest.mark.parametrize("sign", [0, -(2**31)])
@pytest.mark.parametrize("at", [0, 63, 64, 99])
def test_argmax_notices_what_is_no_number_of_either_sign(sign, at):
    logits = torch.randn(2, 100)
    logits.view(torch.int32)[1, at] = 0x7F800001 + sign
    assert argmax(logits).tolist() == [int(logits[0].argmax()), -1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("rule", [{}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.1}])
def test_a_row_without_a_finite_logit_has_no_token_and_its_neighbours_have_theirs(temperature, rule):
    logits = torch.randn(6, 100)
    logits[1], logits[3], logits[4, 7] = -torch.inf, torch.nan, torch.inf
    logits[5], logits[5, 42] = -torch.inf, 0.5
    logits[2, 9] = torch.nan  # one that is no number spoils the row: nothing can be said of its neighbours
    values = {"temperature": temperature, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **rule}
    columns = [torch.full((6,), values[name]) for name in ("temperature", "top_k", "top_p", "min_p")]
    columns = [column.to(torch.int64 if i == 1 else torch.float32) for i, column in enumerate(columns)]
    seeds, positions = torch.arange(6), torch.arange(6) + 3
    for function in (reference.sample, sample):
        ids = function(logits.clone(), *columns, seeds, positions)
        assert ids[1:].tolist() == [-1, -1, -1, -1, 42] and 0 <= ids[0] < 100
    for function in (reference.argmax, argmax):
        ids = function(logits.clone())
        assert ids[1:].tolist() == [-1, -1, -1, -1, 42]


@pytest.mark.parametrize("seed", range(10))
def test_scores_of_rows_that_say_nothing_stay_within_the_vocabulary(seed):
    torch.manual_seed(seed)
    logits = torch.randn(4, 100)
    logits[1], logits[2], logits[3, :98] = -torch.inf, torch.nan, torch.nan
    logprobs, ranks, top_ids, top_logprobs = score(logits, torch.tensor([3, 0, 0, 99]), 5)
    assert (
        ((top_ids >= 0) & (top_ids < 100)).all()
        and logprobs.tolist()[1:] == [-torch.inf] * 3
        and ranks.tolist()[1:] == [1] * 3
    )
    assert (
        logprobs[0].isfinite() and top_logprobs[0].isfinite().all() and (top_logprobs[1:] == -torch.inf).all()
    )


def test_noise_is_finite_for_all_random_bits():
    extremes = reference.uniform(torch.tensor([0, 2**32 - 1]))
    assert extremes[0] > 0 and extremes[1] < 1
    assert np.isfinite([_noise(np.uint64(0)), _noise(np.uint64(2**23 - 1))]).all()
