"""Matrix products with dense packed weights, whichever tile the processor has for them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import run_on_older_processor
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numba import prange
from pagetide.ops import reference
from pagetide.ops.cpu.block import ROOM, SCRATCH_ROWS
from pagetide.ops.cpu.codes import make_rounded
from pagetide.ops.cpu.compiled import as_numpy, borrowed, kernel
from pagetide.ops.cpu.layers import activation_type
from pagetide.ops.cpu.matmul import project, project_gated
from pagetide.ops.cpu.packing import GROUP, Packed, pack, packed_dense
from pagetide.ops.cpu.sync import make_sync, num_concurrent_threads

dtypes = st.sampled_from([torch.float32, torch.bfloat16])
rows = st.integers(1, 140)
inputs = st.sampled_from([16, 32, 48, 96, 576])
outputs = st.sampled_from([32, 96, 320])
relaxed = settings(max_examples=60)


@kernel
def _project(sync, x, rounded, num_rows, weight, bias, adds, out):  # type: ignore[no-untyped-def]
    for thread in prange(sync.shape[1]):
        own = borrowed((x, rounded))
        size = x.shape[1]
        project(borrowed(sync), 0, np.int64(thread), *own, num_rows, weight, 1, size, bias, adds, None, out)


@kernel
def _project_gated(sync, sums, x, rounded, num_rows, weight, bias, is_gelu, out):  # type: ignore[no-untyped-def]
    for thread in prange(sync.shape[1]):
        own = borrowed((x, rounded))
        size = x.shape[1]
        project_gated(
            borrowed(sync),
            0,
            np.int64(thread),
            sums[thread],
            *own,
            num_rows,
            weight,
            1,
            size,
            bias,
            None,
            is_gelu,
            out,
        )


def operands(num_rows: int, num_inputs: int, num_outputs: int, dtype: torch.dtype):
    """x and two matrices, of which the second is meant; and as kernels take them, with poison behind x."""
    x = torch.randn(num_rows + ROOM, num_inputs).to(dtype)
    x[num_rows:] = torch.nan
    matrices = [torch.randn(num_outputs, num_inputs).to(dtype) for _ in range(2)]
    packed = packed_dense(np.stack([as_numpy(pack(matrix)) for matrix in matrices]))
    return x[:num_rows].float(), matrices[1].float(), taken(x, packed), packed


def taken(x: torch.Tensor, packed: Packed) -> np.ndarray:
    return as_numpy(x if activation_type(packed) is np.uint16 else x.float())


def product(x: np.ndarray, num_rows: int, packed: Packed, bias, adds: bool, out: torch.Tensor) -> None:
    sync = make_sync(1, num_concurrent_threads())
    _project(sync, x, make_rounded(0, 0), num_rows, packed, bias.numpy(), adds, out.numpy())


@relaxed
@given(rows, inputs, outputs, dtypes, st.booleans(), st.booleans(), st.integers(0, 99))
@example(33, 96, 32, torch.bfloat16, True, True, 0)
def test_products(num_rows, num_inputs, num_outputs, dtype, adds, has_bias, seed):
    torch.manual_seed(seed)
    x, matrix, own, packed = operands(num_rows, num_inputs, num_outputs, dtype)
    bias = torch.randn(num_outputs) if has_bias else torch.empty(0)
    out = torch.randn(num_rows + ROOM + 1, num_outputs)
    before = out.clone()
    product(own, num_rows, packed, bias, adds, out)
    expected = x @ matrix.T + (bias if has_bias else 0) + (before[:num_rows] if adds else 0)
    torch.testing.assert_close(out[:num_rows], expected, atol=2e-5 * num_inputs**0.5, rtol=1e-5)
    assert torch.equal(out[num_rows + ROOM :], before[num_rows + ROOM :]), "there is no room for more"


@relaxed
@given(rows, inputs, dtypes, st.sampled_from(["silu", "gelu"]), st.integers(0, 99))
def test_gated_products(num_rows, num_inputs, dtype, activation, seed):
    torch.manual_seed(seed)
    x, matrix, own, packed = operands(num_rows, num_inputs, 96, dtype)
    bias = torch.randn(96)
    threads = num_concurrent_threads()
    sums = np.full((threads, SCRATCH_ROWS * GROUP), np.nan, np.float32)
    out = torch.zeros(num_rows, 48)
    places = (bias.numpy(), activation == "gelu", out.numpy())
    _project_gated(make_sync(1, threads), sums, own, make_rounded(0, 0), num_rows, packed, *places)
    gate_up = (x @ matrix.T + bias).unflatten(1, (-1, 2, 16)).transpose(1, 2).flatten(1)
    expected = reference.gated(gate_up, activation)
    torch.testing.assert_close(out, expected, atol=1e-4 * num_inputs, rtol=1e-4)


@relaxed
@given(rows, inputs, dtypes, st.integers(0, 99))
def test_a_row_is_the_same_in_any_company(num_rows, num_inputs, dtype, seed):
    """To the last bit, even beside what is no number."""
    torch.manual_seed(seed)
    _, _, own, packed = operands(num_rows, num_inputs, 32, dtype)
    together, alone = torch.empty(num_rows + ROOM, 32), torch.empty(1 + ROOM, 32)
    nothing = torch.empty(0)
    product(own, num_rows, packed, nothing, False, together)
    row = seed % num_rows
    single = np.ascontiguousarray(own[row : row + 1].repeat(1 + ROOM, axis=0))
    product(single, 1, packed, nothing, False, alone)
    assert torch.equal(together[row], alone[0])


@pytest.mark.parametrize("without", ["avx512", "avx512bf16", "amx"])
def test_on_an_older_processor(without):
    tests = ["test_products", "test_gated_products", "test_a_row_is_the_same_in_any_company"]
    run_on_older_processor(__file__, tests, without)
