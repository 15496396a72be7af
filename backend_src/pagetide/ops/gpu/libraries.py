"""Libraries that attend to prompt chunks in place of the engine's own kernel, where people have them.

Both read the engine's blocks as they are, and compile their kernels when they are first called, which the
trial of memory at load does. Steps in which each sequence has a single token stay with the engine's own
kernel, which graphs can record.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from pagetide.config import Settings, SettingsError
from pagetide.ops.attention import HeadShape, LayerAttention
from pagetide.ops.batch import Batch, to_device
from pagetide.ops.gpu.attention import ChunkAttention, MakeChunks, TiledChunks

_WORKSPACE_BYTES = 128 << 20  # what FlashInfer's documentation recommends


@dataclass(frozen=True)
class Span:
    """Sequences that stand beside each other in a step, and their tokens. counts, lengths: tokens of each in
    this step, and in the cache when it has run.
    """

    sequences: slice
    tokens: slice
    counts: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of(cls, batch: Batch, firsts: np.ndarray, taken: np.ndarray) -> Span:
        first, last = np.flatnonzero(taken)[[0, -1]]
        sequences = slice(first, last + 1)
        counts = batch.counts[sequences].astype(np.int32)
        tokens = slice(firsts[first], firsts[last] + batch.counts[last])
        return cls(sequences, tokens, counts, counts + batch.starts[sequences].astype(np.int32))

    @staticmethod
    def around_chunks(counts: np.ndarray) -> np.ndarray:
        """bool [n]: from the first to the last sequence with more than one token, so that their tokens lie
        together. counts int32 [n].
        """
        longer = np.flatnonzero(counts > 1)
        at = np.arange(len(counts))
        return (longer[0] <= at) & (at <= longer[-1])


def _starts(counts: np.ndarray) -> np.ndarray:
    """int32 [n + 1]: where each one's part begins, and where the last one's ends."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)


@dataclass(frozen=True)
class _FlashInferPlan:
    """A step, for the planning of a layer's kind: query_starts, block_starts int32 [n + 1] and last_lengths
    int32 [n] on the host, blocks int32 on the device. windows: the kinds that have been planned.
    """

    tokens: slice
    query_starts: torch.Tensor
    block_starts: torch.Tensor
    last_lengths: torch.Tensor
    blocks: torch.Tensor
    windows: set[int] = field(default_factory=set)


class FlashInferChunks:
    """ChunkAttention by FlashInfer (arXiv:2501.01005; docs.flashinfer.ai/api/attention.html), whose layout
    HND is the engine's.
    """

    def __init__(self, device: torch.device, shape: HeadShape, dtype: torch.dtype):
        from flashinfer import BatchPrefillWithPagedKVCacheWrapper  # not a dependency: people bring it

        self._make = BatchPrefillWithPagedKVCacheWrapper
        self._shape, self._dtype = shape, dtype
        self._workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        # By the layer's window: a kernel is made for layers with one, or without.
        self._wrappers: dict[int, Any] = {}
        self._copied: dict[int, torch.cuda.Event] = {}

    def takes(self, counts: np.ndarray) -> np.ndarray:
        return Span.around_chunks(counts)

    def plan(self, batch: Batch, firsts: np.ndarray, taken: np.ndarray) -> _FlashInferPlan:
        span = Span.of(batch, firsts, taken)
        num_blocks = -(-span.lengths // batch.block_size)
        block_starts = _starts(num_blocks)
        rows = np.repeat(np.arange(len(num_blocks), dtype=np.int32), num_blocks)
        columns = np.arange(len(rows), dtype=np.int32) - block_starts[rows]
        row, column = to_device(np.stack([rows + span.sequences.start, columns]), batch.ids.device)
        return _FlashInferPlan(
            span.tokens,
            torch.from_numpy(_starts(span.counts)),
            torch.from_numpy(block_starts),
            torch.from_numpy(span.lengths - (num_blocks - 1) * batch.block_size),
            batch.block_table[row, column],
        )

    def attend(
        self,
        q: torch.Tensor,
        kv: torch.Tensor,
        layer: LayerAttention,
        batch: Batch,
        plan: _FlashInferPlan,
        out: torch.Tensor,
    ) -> None:
        if layer.window not in plan.windows:
            self._plan_window(layer.window, kv, plan)
        is_fp8 = kv.dtype is torch.float8_e4m3fn
        self._wrappers[layer.window].run(
            q[plan.tokens],
            kv,
            k_scale=layer.k_scale if is_fp8 else None,
            v_scale=layer.v_scale if is_fp8 else None,
            out=out[plan.tokens].unflatten(1, (self._shape.num_heads, self._shape.head_dim)),
        )

    def _plan_window(self, window: int, kv: torch.Tensor, plan: _FlashInferPlan) -> None:
        if window not in self._wrappers:
            self._wrappers[window] = self._make(self._workspace, "HND")
        if window in self._copied:
            # It plans into memory of the host that the device may not have read yet: of the last step, which
            # was queued behind the one before it.
            self._copied[window].synchronize()
        self._wrappers[window].plan(
            plan.query_starts,
            plan.block_starts,
            plan.blocks,
            plan.last_lengths,
            self._shape.num_heads,
            self._shape.num_kv_heads,
            self._shape.head_dim,
            kv.shape[3],
            causal=True,
            sm_scale=self._shape.scale,
            window_left=window - 1 if window else -1,
            logits_soft_cap=self._shape.soft_cap or None,
            q_data_type=self._dtype,
            kv_data_type=kv.dtype,
        )
        if kv.is_cuda:
            self._copied[window] = torch.cuda.current_stream().record_event()
        plan.windows.add(window)


@dataclass(frozen=True)
class _FlashAttentionPlan:
    """query_starts: int32 [n + 1], on the device."""

    span: Span
    query_starts: torch.Tensor


class FlashAttention4Chunks:
    """ChunkAttention by FlashAttention 4 (github.com/Dao-AILab/flash-attention, flash_attn/cute)."""

    def __init__(self, device: torch.device, shape: HeadShape, dtype: torch.dtype):
        from flash_attn.cute import flash_attn_varlen_func  # not a dependency: people bring it

        self._attend = flash_attn_varlen_func
        self._shape = shape

    def takes(self, counts: np.ndarray) -> np.ndarray:
        return Span.around_chunks(counts)

    def plan(self, batch: Batch, firsts: np.ndarray, taken: np.ndarray) -> _FlashAttentionPlan:
        span = Span.of(batch, firsts, taken)
        return _FlashAttentionPlan(span, to_device(_starts(span.counts), batch.ids.device))

    def attend(
        self,
        q: torch.Tensor,
        kv: torch.Tensor,
        layer: LayerAttention,
        batch: Batch,
        plan: _FlashAttentionPlan,
        out: torch.Tensor,
    ) -> None:
        span = plan.span
        keys, values = kv[:, 0].transpose(1, 2), kv[:, 1].transpose(1, 2)  # [blocks, tokens, KV heads, size]
        result, _ = self._attend(
            q[span.tokens],
            keys,
            values,
            cu_seqlens_q=plan.query_starts,
            max_seqlen_q=int(span.counts.max()),
            seqused_k=batch.lengths[span.sequences],
            page_table=batch.block_table[span.sequences],
            softmax_scale=self._shape.scale,
            causal=True,
            window_size=(layer.window - 1, 0) if layer.window else (None, None),
            softcap=self._shape.soft_cap,
        )
        out[span.tokens] = result.flatten(1)


@dataclass(frozen=True)
class _Library:
    """module: what is imported; package: what pip installs; devices: major compute capabilities; head_dims:
    sizes of heads that it has kernels for.
    """

    make: Callable[[torch.device, HeadShape, torch.dtype], ChunkAttention]
    module: str
    package: str
    devices: frozenset[int]
    head_dims: frozenset[int]
    takes_fp8_cache: bool

    def reason_against(self, device: torch.device, dtype: torch.dtype, has_fp8_cache: bool) -> str:
        """Why it cannot be used here; empty: it can."""
        if device.type != "cuda":
            return "which needs a GPU"
        if not _is_installed(self.module):
            return f"which is not installed (pip install {self.package})"
        major, minor = torch.cuda.get_device_capability(device)
        if major not in self.devices:
            return (
                f"which has no kernels over a paged cache for this GPU's compute capability {major}.{minor}"
            )
        if dtype not in (torch.bfloat16, torch.float16):
            return "which needs dtype bfloat16 or float16"
        if has_fp8_cache and not self.takes_fp8_cache:
            return "which does not read an FP8 cache (kv_cache_dtype)"
        return ""


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it would be in
        return False


_LIBRARIES = {
    "flashinfer": _Library(
        FlashInferChunks,
        "flashinfer",
        "flashinfer-python",
        frozenset({8, 9, 10, 11, 12}),
        frozenset({64, 128, 256}),
        takes_fp8_cache=True,
    ),
    "flash_attn_4": _Library(
        FlashAttention4Chunks,
        "flash_attn.cute",
        "--pre flash-attn-4",
        frozenset({9, 10, 11}),
        frozenset(range(8, 129, 8)),
        takes_fp8_cache=False,
    ),
}


def chunk_attention(settings: Settings, device: torch.device, dtype: torch.dtype) -> MakeChunks:
    """What makes the one that attention_backend names. Raises SettingsError, also when called with heads that
    it does not take.
    """
    name = settings.attention_backend
    if name in ("auto", "triton"):
        return TiledChunks
    library = _LIBRARIES[name]
    reason = library.reason_against(device, dtype, settings.kv_cache_dtype == "fp8")
    if reason:
        raise SettingsError(f"attention_backend is {name}, {reason}; use auto, the engine's own kernels")

    def make(shape: HeadShape, dtype: torch.dtype) -> ChunkAttention:
        if shape.head_dim not in library.head_dims:
            raise SettingsError(
                f"attention_backend is {name}, which has no kernel for heads of {shape.head_dim}, which this "
                "model has; use auto, the engine's own kernels"
            )
        return library.make(device, shape, dtype)

    return make
