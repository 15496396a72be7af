"""The CPU kernels of a decoder's layers and of its embedding, each against its torch reference, over random
shapes, with poisoned outputs, in both storage types.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import ops
import pytest
import torch
from cases import (
    capped_shape,
    give_adapters,
    random_layers,
    rotary_like,
    run_on_older_processor,
    run_steps,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numba import njit, prange
from pagetide.ops import reference
from pagetide.ops.adapters import AdapterRoom
from pagetide.ops.attention import HeadShape
from pagetide.ops.batch import Batch
from pagetide.ops.cpu.attention_tasks import MAX_ROWS, plan_tasks
from pagetide.ops.cpu.embedding import CompiledEmbedding
from pagetide.ops.cpu.gather import gather
from pagetide.ops.cpu.layers import PHASES, CompiledLayers, stack
from pagetide.ops.cpu.packing import pack, read_rows
from pagetide.ops.cpu.sync import finish, make_sync, num_concurrent_threads, take
from pagetide.ops.layers import ComposedLayers, EmbeddingWeights, LayerShape
from pagetide.ops.plain import TORCH_LAYERS, TorchEmbedding
from pagetide.ops.weights import DenseWeight
from triton_server import ROOT

dtypes = st.sampled_from([torch.float32, torch.bfloat16])
relaxed = settings(max_examples=40)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("outputs", [1, 16, 40, 64])
def test_packing_keeps_every_element(dtype, outputs):
    weight = torch.randn(outputs, 46).to(dtype)
    rows = torch.tensor([outputs - 1, 0, outputs // 2])
    assert torch.equal(read_rows(pack(weight), 46, rows), weight[rows].float())


@relaxed
@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 40)), min_size=1, max_size=6),
    st.sampled_from([4, 16]),
    st.integers(0, 99),
)
def test_gather(sequences, block_size, seed):
    rng = np.random.default_rng(seed)
    starts, counts = (np.array(values, np.int32) for values in zip(*sequences, strict=True))
    history = torch.from_numpy(rng.integers(0, 1000, (9, 101)))
    table = torch.from_numpy(rng.integers(0, 50, (9, 26)).astype(np.int32))
    rows = rng.permutation(9)[: len(counts)].astype(np.int32)
    lengths = np.full(9, 77, np.int32)
    lengths[rows] = starts
    shared = *(torch.from_numpy(array) for array in (rows, counts)), int(counts.sum()), block_size
    expected = []
    for row, start, count in zip(rows, starts, counts, strict=True):
        for position in range(start, start + count):
            expected.append(
                (
                    int(history[row, position]),
                    position,
                    int(table[row, position // block_size]) * block_size + position % block_size,
                )
            )
    for function in (reference.gather, gather):
        growing = torch.from_numpy(lengths.copy())
        ids, positions, slots, tables, ends = function(history, table, growing, *shared)
        assert (
            ends.tolist() == (starts + counts).tolist() == growing.numpy()[rows].tolist()
            and growing.sum() == lengths.sum() + counts.sum()
        )
        assert list(zip(ids.tolist(), positions.tolist(), slots.tolist(), strict=True)) == expected
        assert torch.equal(tables, table[torch.from_numpy(rows).long()])


@relaxed
@given(
    st.integers(1, 9),
    st.sampled_from([5, 32, 100]),
    st.sampled_from([32, 96]),
    dtypes,
    st.booleans(),
    st.integers(0, 99),
)
def test_embedding(tokens, vocabulary, hidden, dtype, is_tied, seed):
    torch.manual_seed(seed)
    matrices = [torch.randn(vocabulary, hidden).to(dtype) for _ in range(1 if is_tied else 2)]
    weights = EmbeddingWeights(
        DenseWeight(matrices[0]), None if is_tied else DenseWeight(matrices[1]), torch.randn(hidden), 1e-5
    )
    expected, compiled = TorchEmbedding(weights), CompiledEmbedding(weights)
    ids = torch.randint(0, vocabulary, (tokens,))
    assert torch.equal(compiled.embed(ids), expected.embed(ids))
    residual = torch.randn(tokens, hidden)
    for rows in (tokens, 1, tokens):  # the memory of one call serves the next
        compiled._logits.fill_(torch.nan)
        logits = compiled.logits(residual[:rows])
        assert logits.is_contiguous()
        tolerance = 0.2 if dtype is torch.bfloat16 else 1e-4
        torch.testing.assert_close(logits, expected.logits(residual[:rows]), atol=tolerance, rtol=1e-3)


@settings(max_examples=60)
@given(
    st.lists(
        st.lists(st.sampled_from([0, 1, 1, 1, 2, 3, 7, 16, 17, 50]), min_size=3, max_size=3).filter(any),
        min_size=1,
        max_size=6,
    ),
    st.sampled_from([(4, 4, 16), (6, 2, 32), (9, 3, 64), (7, 1, 80), (2, 1, 128)]),
    st.sampled_from([16, 48]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([0, 5, 33]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2),
    st.integers(0, 99),
)
def test_layers(lengths, heads, block_size, dtype, window, has_norms, has_bias, is_capped, adapters, seed):
    """Whole steps through two layers, prompts in chunks and single tokens mixed; what is read of the cache
    must have been written.
    """
    torch.manual_seed(seed)
    cos_sin = rotary_like(400, heads[2])
    shape = LayerShape(
        2, 64, 48, HeadShape(*heads), block_size, 1e-5, cos_sin, adapters=AdapterRoom(adapters, 7)
    )
    shape = capped_shape(shape) if is_capped else shape
    weights = random_layers(shape, dtype, window, has_norms, has_bias)
    compiled, composed = CompiledLayers(shape, weights), ComposedLayers(TORCH_LAYERS, shape, weights)
    give_adapters(shape, compiled, composed)
    expected = run_steps(composed, shape, lengths, 0.0, dtype)
    found = run_steps(compiled, shape, lengths, torch.nan, dtype)
    tolerance = 0.25 if dtype is torch.bfloat16 else 2e-4
    for own, right in zip(found, expected, strict=True):
        torch.testing.assert_close(own, right, atol=tolerance, rtol=1e-3 if dtype is torch.float32 else 0.05)


@pytest.mark.parametrize("window", [0, 700])
def test_long_contexts_are_split_and_merged(window):
    torch.manual_seed(0)
    shape = LayerShape(2, 64, 48, HeadShape(6, 2, 32), 16, 1e-5, rotary_like(3000, 32))
    weights = random_layers(shape, torch.float32, window, False, False)
    lengths = [[2500, 5], [1, 1], [1, 0], [0, 1]]
    expected = run_steps(ComposedLayers(TORCH_LAYERS, shape, weights), shape, lengths, 0.0, torch.float32)
    compiled = CompiledLayers(shape, weights)
    assert len(plan_tasks(single(2501), shape.heads, 2).merges) == 2
    for own, right in zip(
        run_steps(compiled, shape, lengths, torch.nan, torch.float32), expected, strict=True
    ):
        torch.testing.assert_close(own, right, atol=1e-3, rtol=1e-3)


def test_there_is_a_bias_for_every_output_that_is_computed():
    """Whole groups are: with 5 heads of 16, 16 more than the model has."""
    shape = LayerShape(2, 64, 48, HeadShape(3, 1, 16), 16, 1e-5, rotary_like(64, 16))
    arrays = stack(shape, random_layers(shape, torch.float32, 0, False, True))
    inputs = {"qkv": 64, "out": 48, "gate_up": 64, "down": 48}
    for name, size in inputs.items():
        assert arrays[f"{name}_bias"].shape == (2, arrays[name].shape[1] // size)


def test_layers_say_what_each_phase_took():
    shape = LayerShape(2, 64, 48, HeadShape(6, 2, 32), 16, 1e-5, rotary_like(3000, 32))
    compiled = CompiledLayers(shape, random_layers(shape, torch.float32, 0, False, False))
    assert not compiled.ticks.any()
    run_steps(compiled, shape, [[20, 5]], 0.0, torch.float32)
    took = dict(zip(PHASES, compiled.ticks.T.tolist(), strict=True))
    assert took.pop("merge") == [0, 0], "no context was split"
    assert took.pop("round") == [0, 0], "nothing is quantized"
    assert took.pop("norm, add") == [0, 0], "what is added has no norm"
    assert took.pop("adapters") == [0, 0], "no token has one"
    assert all(ticks > 0 for by_layer in took.values() for ticks in by_layer)


def test_the_ops_of_a_step_add_up_to_it():
    """What scripts/benchmark.py --ops shows, of two small cases."""
    cases = (ops.Case("decode", 2, 20, 1), ops.Case("prompt", 1, 0, 48))
    measured = ops.measure("", str(ROOT / ".cache"), {"read_gb_s": 30.0, "gflop_s": 400.0}, cases)
    for rows in measured.values():
        *parts, whole = rows
        assert all(
            row.seconds > 0
            for row in parts
            if row.name in {*PHASES} - {"merge", "round", "norm, add", "adapters"}
        )
        assert sum(row.seconds for row in parts) == pytest.approx(whole.seconds)


def single(position: int) -> Batch:
    nothing = torch.empty(0)
    return Batch(
        nothing,
        nothing,
        nothing,
        nothing,
        nothing,
        nothing,
        np.ones(1, np.int32),
        np.array([position], np.int32),
        16,
    )


def tables(prefixes: list[tuple[int, int]], block_size: int) -> torch.Tensor:
    """Block tables of sequences of 4,200 tokens; prefixes: whose prefix each begins with, and how many of its
    blocks.
    """
    size = -(-4200 // block_size)
    own = torch.arange(len(prefixes) * size, dtype=torch.int32).view(-1, size) + 4 * size
    for row, (family, shared) in zip(own, prefixes, strict=True):
        row[:shared] = torch.arange(shared) + family * size
    return own


@relaxed
@given(
    st.lists(
        st.tuples(
            st.sampled_from([0, 510, 511, 512, 1023, 1024]) | st.integers(0, 4000),
            st.sampled_from([1, 1, 1, 1, 1, 2, 20, 130]),
            st.tuples(st.integers(0, 1), st.sampled_from([0, 31, 33, 64, 100, 250])),
        ),
        min_size=1,
        max_size=8,
    ),
    st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7), st.integers(0, 70)), max_size=4),
    st.sampled_from([(4, 4, 16), (9, 3, 64), (40, 1, 16)]),
    st.sampled_from([1, 2, 7]),
    st.sampled_from([16, 32, 48]),
    st.booleans(),
)
# Two segments for three; and one who shares the second, but of the first only the last block.
@example([(start, 1, (0, 64)) for start in (1500, 1600, 1700)], [], (4, 4, 16), 1, 16, True)
@example(
    [(1200, 1, (1, 0)), (1200, 1, (1, 0)), (1200, 1, (0, 64)), (1200, 1, (0, 64))],
    [(0, 1, 31), *((0, 2, block) for block in range(32, 64))],
    (4, 4, 16),
    1,
    16,
    True,
)
def test_tasks_cover_every_query_and_key_once(sequences, changes, shape, num_threads, block_size, may_share):
    heads = HeadShape(*shape)
    starts, counts = (np.array(values, np.int32) for values in list(zip(*sequences, strict=True))[:2])
    # What a sequence writes into is its own.
    prefixes = [(family, min(shared, start // block_size)) for start, _, (family, shared) in sequences]
    table, nothing = tables(prefixes, block_size), torch.empty(0)
    for to, source, block in changes:  # equal blocks behind others, and others behind equal ones
        if max(to, source) < len(table) and block < min(starts[to], starts[source]) // block_size:
            table[to, block] = table[source, block]
    batch = Batch(nothing, nothing, nothing, table, nothing, nothing, counts, starts, block_size)
    work = plan_tasks(batch, heads, num_threads, may_share)
    firsts = np.cumsum(counts) - counts
    owner = np.repeat(np.arange(len(counts)), counts)
    covered = {}
    for task, end in zip(work.tasks.tolist(), work.ends.tolist(), strict=True):
        sequence, head, first, queries, position, begin, part, member = task
        assert queries * heads.group <= max(heads.group, MAX_ROWS)
        members = work.members[member : member + queries].tolist()
        if member < 0:
            assert position - starts[sequence] == first - firsts[sequence]
            members = [(first + query, part) for query in range(queries)]
        for token, own in members:
            blocks = slice(begin // block_size, -(-end // block_size))
            assert member < 0 or (table[owner[token], blocks] == table[sequence, blocks]).all()
            covered.setdefault((head, token), []).append((begin, end, own))
    for (head, token), ranges in covered.items():
        ranges.sort()
        keys = starts[owner[token]] + token - firsts[owner[token]] + 1
        parts = [part for _, _, part in ranges]
        if parts == [-1]:
            assert ranges[0][0] == 0 and ranges[0][1] >= keys
            continue
        assert [begin for begin, _, _ in ranges] == [0] + [end for _, end, _ in ranges[:-1]]
        assert ranges[-1][1] == keys and counts[owner[token]] == 1
        assert [token, head, parts[0], len(parts)] in work.merges.tolist()
        assert parts == list(range(parts[0], parts[-1] + 1))
    every = [(head, token) for head in range(heads.num_kv_heads) for token in range(counts.sum())]
    assert sorted(covered) == every
    used = sorted(part for ranges in covered.values() for _, _, part in ranges if part >= 0)
    assert used == list(range(len(work.parts))), "each has a place of its own"


@pytest.mark.parametrize(
    ("heads", "block_size"), [((9, 3, 64), 16), ((4, 4, 32), 32), ((4, 2, 64), 16), ((12, 1, 16), 16)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_a_shared_prefix_changes_no_bit(heads, block_size, dtype):
    """Sequences most of which begin alike for one segment or two, together and alone."""
    torch.manual_seed(0)
    shape = LayerShape(2, 64, 48, HeadShape(*heads), block_size, 1e-5, rotary_like(2000, heads[2]))
    if dtype is torch.uint8:
        shape = replace(shape, kv_dtype=torch.uint8)
    exact = torch.float32 if dtype is torch.float32 else torch.bfloat16
    layers = CompiledLayers(shape, random_layers(shape, exact, 0, True, False))
    segment, size, count = 512 // block_size, 2000 // block_size, 40
    table = torch.arange(count * size, dtype=torch.int32).view(count, size)
    table[1:-1, :segment] = table[0, :segment]
    table[1:20, segment : 2 * segment] = table[0, segment : 2 * segment]
    fill = 255 if dtype is torch.uint8 else torch.nan
    pool = torch.full((2, count * size, *layers.block_shape), fill, dtype=dtype)

    def step(chosen, starts, count):
        positions = torch.cat([torch.arange(start, start + count) for start in starts])
        owner = torch.repeat_interleave(torch.tensor(chosen), count)
        slots = table[owner, positions // block_size].long() * block_size + positions % block_size
        counts = np.full(len(chosen), count, np.int32)
        noise = [
            torch.Generator().manual_seed(100 * i + start) for i, start in zip(chosen, starts, strict=True)
        ]
        residual = torch.cat([torch.randn(count, 64, generator=one) for one in noise])
        begins = np.array(starts, np.int32)
        tensors = (positions, positions, slots, table[chosen].contiguous(), positions, positions)
        batch = Batch(*tensors, counts, begins, block_size)
        layers(residual, batch, pool)
        return residual, plan_tasks(batch, shape.heads, 2)

    begins = [0] + [1024] * 19 + [512] * 19 + [0]
    ends = [1024, *range(1025, 1044), *range(513, 532), 1300]
    for i, (start, end) in enumerate(zip(begins, ends, strict=True)):
        step([i], [start], end - start)
    together, work = step(list(range(count)), ends, 1)
    assert len(work.members) == heads[1] * (39 + 20), "two segments"
    assert 1 < work.tasks[work.tasks[:, 7] >= 0, 3].max() <= MAX_ROWS // shape.heads.group
    alone = [step([i], [end], 1)[0] for i, end in enumerate(ends)]
    assert torch.equal(together, torch.cat(alone))
    assert together.isfinite().all()


@njit(parallel=True)
def _take_all(sync, num_tasks, taken):
    for number in prange(sync.shape[1]):
        thread = np.int64(number)
        task = take(sync, 0, thread, num_tasks)
        while task >= 0:
            taken[task] += 1
            task = take(sync, 0, thread, num_tasks)
        finish(sync, 0, thread)


@pytest.mark.parametrize("num_tasks", [0, 1, 2, 1001])
def test_threads_take_every_task_once(num_tasks):
    taken = np.zeros(num_tasks, np.int64)
    _take_all(make_sync(1, num_concurrent_threads()), num_tasks, taken)
    assert (taken == 1).all()


def test_kernels_for_a_processor_without_avx512():
    tests = ["test_layers", "test_embedding", "test_long_contexts_are_split_and_merged"]
    run_on_older_processor(__file__, tests)
