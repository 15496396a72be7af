"""Prompt chunks by FlashInfer and FlashAttention 4: by themselves on a GPU that has them; elsewhere by
stand-ins that do in torch what the libraries' documentation says of each argument.
"""

from __future__ import annotations

import sys
import types
from functools import partial

import numpy as np
import pytest
import torch
from cases import capped_shape, rotary_like
from gpu_cases import check_layers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from interpreted import DEVICE, HAS_GPU
from pagetide.config import Settings, SettingsError
from pagetide.ops.attention import HeadShape, LayerAttention, attend_chunk
from pagetide.ops.batch import Batch
from pagetide.ops.gpu import libraries
from pagetide.ops.gpu.libraries import FlashAttention4Chunks, FlashInferChunks, Span, chunk_attention
from pagetide.ops.layers import LayerShape
from pagetide.ops.select import select_ops


def attended(q, keys, values, scale, window, cap):
    """q [t, H, D] of a sequence's last tokens, keys and values [K, length, D] -> [t, H, D]."""
    shape = HeadShape(q.shape[1], len(keys), q.shape[2], query_size=scale**-2, soft_cap=cap)
    start = keys.shape[1] - len(q)
    found = attend_chunk(
        q.transpose(0, 1)[None].float(), keys[None].float(), values[None].float(), start, window, shape
    )
    return found[0].transpose(0, 1).to(q.dtype)


class Wrapper:
    """flashinfer.BatchPrefillWithPagedKVCacheWrapper, of its documentation what the engine uses."""

    def __init__(self, float_workspace_buffer, kv_layout):
        assert float_workspace_buffer.dtype is torch.uint8 and kv_layout == "HND"

    def plan(
        self,
        qo_indptr,
        paged_kv_indptr,
        paged_kv_indices,
        paged_kv_last_page_len,
        num_qo_heads,
        num_kv_heads,
        head_dim_qk,
        page_size,
        *,
        causal,
        sm_scale,
        window_left,
        logits_soft_cap,
        q_data_type,
        kv_data_type,
    ):
        lists = (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        assert all(tensor.dtype is torch.int32 and tensor.is_contiguous() for tensor in lists)
        assert len(qo_indptr) == len(paged_kv_indptr) == len(paged_kv_last_page_len) + 1
        assert paged_kv_indptr[-1] == len(paged_kv_indices) and causal
        assert ((paged_kv_last_page_len >= 1) & (paged_kv_last_page_len <= page_size)).all()
        self.lists = [tensor.tolist() for tensor in lists]
        self.heads = (num_qo_heads, num_kv_heads, head_dim_qk, page_size)
        self.scores = (sm_scale, window_left + 1, logits_soft_cap or 0.0)
        self.types = (q_data_type, kv_data_type)

    def run(self, q, paged_kv_cache, *, k_scale, v_scale, out):
        queries, pages, indices, last = self.lists
        assert (q.dtype, paged_kv_cache.dtype) == self.types
        num_heads, num_kv_heads, head_dim, page_size = self.heads
        assert q.shape == out.shape == (queries[-1], num_heads, head_dim)
        assert paged_kv_cache.shape[1:] == (2, num_kv_heads, page_size, head_dim)
        for i, rest in enumerate(last):
            kv = paged_kv_cache[indices[pages[i] : pages[i + 1]]].float()  # [pages, 2, K, page_size, D]
            length = (len(kv) - 1) * page_size + rest
            keys, values = kv.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :length]
            rows = slice(queries[i], queries[i + 1])
            found = attended(q[rows], keys * (k_scale or 1), values * (v_scale or 1), *self.scores)
            out[rows] = found
        return out


def flash_attn_varlen_func(
    q,
    k,
    v,
    *,
    cu_seqlens_q,
    max_seqlen_q,
    seqused_k,
    page_table,
    softmax_scale,
    causal,
    window_size,
    softcap,
):
    """flash_attn.cute's, of its documentation what the engine uses."""
    counts = cu_seqlens_q.diff()
    assert cu_seqlens_q[0] == 0 and cu_seqlens_q[-1] == len(q) and counts.max() == max_seqlen_q
    assert {x.dtype for x in (cu_seqlens_q, seqused_k, page_table)} == {torch.int32}
    assert seqused_k.stride(0) == page_table.stride(1) == 1 and k.dtype is v.dtype is q.dtype and causal
    assert len(seqused_k) == len(page_table) == len(counts)
    left, right = window_size
    assert right == (None if left is None else 0)
    out = torch.empty_like(q)
    for i, length in enumerate(seqused_k.tolist()):
        pages = page_table[i, : -(-length // k.shape[1])].long()
        keys, values = (x[pages].flatten(0, 1)[:length].transpose(0, 1) for x in (k, v))
        rows = slice(cu_seqlens_q[i], cu_seqlens_q[i + 1])
        window = 0 if left is None else left + 1
        out[rows] = attended(q[rows], keys, values, softmax_scale, window, softcap)
    return out, None


@pytest.fixture(scope="module", autouse=True)
def stand_ins():
    """Without a GPU the libraries cannot run, nor need be there."""
    if HAS_GPU:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        flashinfer = types.ModuleType("flashinfer")
        flashinfer.BatchPrefillWithPagedKVCacheWrapper = Wrapper
        cute = types.ModuleType("flash_attn.cute")
        cute.flash_attn_varlen_func = flash_attn_varlen_func
        patch.setitem(sys.modules, "flashinfer", flashinfer)
        patch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
        patch.setitem(sys.modules, "flash_attn.cute", cute)
        yield


def take(name: str, module: str):
    """What makes the library's chunks; skips where a GPU has it not."""
    if HAS_GPU:
        pytest.importorskip(module)
    return partial({"flashinfer": FlashInferChunks, "flash_attn_4": FlashAttention4Chunks}[name], DEVICE)


STEPS = [[50, 1, 0, 1], [1, 1, 20, 1], [1, 3, 1, 5], [1, 1, 1, 1], [2, 1, 1, 17]]
DTYPE = torch.bfloat16 if HAS_GPU else torch.float16


@settings(max_examples=30 if HAS_GPU else 4)
@example(STEPS, (4, 2, 64), 16, 0, False, False)
@example(STEPS, (4, 2, 64), 16, 5, True, True)
@given(
    st.lists(
        st.lists(st.sampled_from([0, 1, 1, 1, 2, 3, 7, 16, 17, 50]), min_size=3, max_size=3).filter(any),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from([(4, 4, 64), (9, 3, 64), (2, 1, 128)]),
    st.sampled_from([16, 8]),
    st.sampled_from([0, 5, 33]),
    st.booleans(),
    st.booleans(),
)
@pytest.mark.parametrize("name, module", [("flashinfer", "flashinfer"), ("flash_attn_4", "flash_attn.cute")])
def test_layers_with_chunks_by_a_library(
    name, module, lengths, heads, block_size, window, has_fp8, is_capped
):
    """Whole steps through two layers, prompts in chunks and single tokens mixed in any order."""
    make = take(name, module)
    torch.manual_seed(len(lengths))
    shape = LayerShape(2, 64, 48, HeadShape(*heads), block_size, 1e-5, rotary_like(400, heads[2]))
    shape = capped_shape(shape) if is_capped else shape
    has_fp8 = has_fp8 and name == "flashinfer"
    check_layers(shape, lengths, DTYPE, window, True, False, has_fp8, make)


def test_what_lies_between_two_chunks_goes_with_them():
    taken = Span.around_chunks(np.array([1, 1, 5, 1, 2, 1], np.int32))
    assert taken.tolist() == [False, False, True, True, True, False]


def test_layers_of_two_kinds_are_planned_apart():
    """Gemma's layers: those with a window, and those without, in one step."""
    if HAS_GPU:
        pytest.skip("test_layers shows there what comes of it")
    chunks = FlashInferChunks(DEVICE, HeadShape(2, 1, 64), DTYPE)
    planned = []

    class Recorded(Wrapper):
        def plan(self, *args, window_left, **options):
            planned.append(window_left)
            super().plan(*args, window_left=window_left, **options)

    chunks._make = Recorded
    counts, starts = np.array([20], np.int32), np.array([0], np.int32)
    table = torch.tensor([[1, 0]], dtype=torch.int32)
    positions = torch.arange(20)
    batch = Batch(positions, positions, positions, table, torch.tensor([20]), positions, counts, starts, 16)
    kv = torch.randn(2, 2, 1, 16, 64).to(DTYPE)
    q = torch.randn(20, 2, 64).to(DTYPE)
    plan = chunks.plan(batch, np.zeros(1, np.int32), np.array([True]))
    for window in (4, 0, 4, 0):
        layer = LayerAttention(q, window, None, None, 1e-5)
        out = torch.full((20, 128), torch.nan, dtype=DTYPE)
        chunks.attend(q, kv, layer, batch, plan, out)
        keys, values = kv[[1, 0]].permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :20]
        assert torch.equal(out.view(20, 2, 64), attended(q, keys, values, 0.125, window, 0.0))
    assert planned == [3, -1]


@pytest.mark.parametrize("name", ["triton", "flashinfer", "flash_attn_4"])
@pytest.mark.parametrize("ops", ["auto", "reference"])
def test_a_cpu_has_no_choice(name, ops, tmp_path):
    wanted = Settings(attention_backend=name, ops=ops)
    with pytest.raises(SettingsError, match=f"attention_backend is {name}, which needs the kernels of a GPU"):
        select_ops(torch.device("cpu"), wanted, torch.float32, tmp_path)


@pytest.mark.parametrize(
    "wanted, capability, dtype, reason",
    [
        (
            {"attention_backend": "flashinfer"},
            (9, 0),
            torch.bfloat16,
            "not installed .pip install flashinfer",
        ),
        ({"attention_backend": "flash_attn_4"}, (9, 0), torch.bfloat16, "not installed .pip install --pre"),
        ({"attention_backend": "flash_attn_4"}, (8, 0), torch.bfloat16, "no kernels over a paged cache for"),
        ({"attention_backend": "flashinfer"}, (9, 0), torch.float32, "needs dtype bfloat16 or float16"),
        (
            {"attention_backend": "flash_attn_4", "kv_cache_dtype": "fp8"},
            (9, 0),
            torch.bfloat16,
            "does not read an FP8 cache",
        ),
    ],
)
def test_what_a_library_cannot_do_is_refused(wanted, capability, dtype, reason, monkeypatch):
    monkeypatch.setattr(libraries, "_is_installed", lambda module: "not installed" not in reason)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with pytest.raises(SettingsError, match=reason):
        chunk_attention(Settings(**wanted), torch.device("cuda"), dtype)


def test_heads_that_a_library_does_not_take_are_refused(monkeypatch):
    monkeypatch.setattr(libraries, "_is_installed", lambda module: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    make = chunk_attention(Settings(attention_backend="flashinfer"), torch.device("cuda"), torch.bfloat16)
    with pytest.raises(SettingsError, match="no kernel for heads of 96, which this model has"):
        make(HeadShape(2, 2, 96), torch.bfloat16)
