"""The GPU's kernels alone, for scripts/gpu_check.py: attention, sampling, and the choice of tiles."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from gpu_scale import Rows, Scale, share
from pagetide.config import Settings, SettingsError
from pagetide.ops.attention import HeadShape, LayerAttention
from pagetide.ops.batch import Batch
from pagetide.ops.gpu import decode, prefill
from pagetide.ops.gpu.attention import MakeChunks, TiledChunks
from pagetide.ops.gpu.libraries import chunk_attention
from pagetide.ops.gpu.sampling import sample


def measure_decode_attention(scale: Scale, kept: torch.dtype | None = None) -> Rows:
    """The decode kernel alone: bytes of keys and values a second, against the memory's. kept: the type of
    the cache; None: the engine's own.
    """
    kept = kept or scale.dtype
    cases = (
        [(1, 4096), (1, 32_768), (8, 1024), (8, 16_384), (64, 1024), (256, 1024)]
        if scale.is_gpu
        else [(2, 70)]
    )
    shapes = {"8B": HeadShape(32, 8, 128), "0.6B": HeadShape(16, 8, 128), "1B": HeadShape(32, 8, 64)}
    rows = []
    for name, shape in shapes.items() if scale.is_gpu else {"tiny": HeadShape(2, 1, 16)}.items():
        for batch, context in cases:
            copies = 1 if batch * context > 100_000 else 4
            functions = [decode_call(scale, shape, batch, context, kept) for _ in range(copies)]
            seconds = scale.looped(functions)
            moved = batch * context * 2 * shape.num_kv_heads * shape.head_dim * kept.itemsize
            rows.append(
                {
                    "heads": name,
                    "batch": batch,
                    "context": context,
                    "us": seconds * 1e6,
                    "TB/s": moved / seconds / 1e12,
                    "of memory": share(moved / seconds, scale.limits["bytes_s"]),
                }
            )
    return rows


def decode_call(
    scale: Scale, shape: HeadShape, batch: int, context: int, kept: torch.dtype
) -> Callable[[], None]:
    num_blocks = -(-context // 16)
    kv = torch.randn(num_blocks * batch, 2, shape.num_kv_heads, 16, shape.head_dim, device=scale.device).to(
        kept
    )
    table = torch.randperm(num_blocks * batch, device=scale.device).to(torch.int32).view(batch, num_blocks)
    lengths = torch.full((batch,), context, dtype=torch.int32, device=scale.device)
    order = torch.arange(batch, dtype=torch.int32, device=scale.device)
    q = torch.randn(batch, shape.num_heads, shape.head_dim, device=scale.device).to(scale.dtype)
    out = torch.empty(batch, shape.num_heads * shape.head_dim, dtype=scale.dtype, device=scale.device)
    singles = decode.plan_singles(shape, order, order, num_blocks, 16)
    layer = LayerAttention(q, 0, None, None, 1e-5)
    return lambda: decode.attend_singles(shape, q, kv, table, lengths, layer, singles, out)


def measure_prefill_attention(scale: Scale) -> Rows:
    """Attention of a prompt alone, by the engine's kernel and by the libraries that are installed: operations
    a second (the causal half counted), against matrix products'.
    """
    shapes = {"8B": HeadShape(32, 8, 128), "1B": HeadShape(32, 8, 64)}
    rows = []
    for name, shape in shapes.items() if scale.is_gpu else {"tiny": HeadShape(2, 1, 16)}.items():
        for length in (512, 2048, 8192) if scale.is_gpu else (70,):
            own = 0.0
            for backend, make_chunks in installed_chunks(scale).items():
                seconds = scale.looped([prefill_call(scale, make_chunks, shape, length)] * 2)
                own = own or seconds
                flops = 2 * length**2 * shape.num_heads * shape.head_dim
                rows.append(
                    {
                        "heads": name,
                        "length": length,
                        "attention_backend": backend,
                        "us": seconds * 1e6,
                        "TFLOP/s": flops / seconds / 1e12,
                        "of matmul": share(flops / seconds, scale.limits["flops"]),
                        "times as fast as triton": own / seconds,
                    }
                )
    return rows


def installed_chunks(scale: Scale) -> dict[str, MakeChunks]:
    """By the values of attention_backend, the engine's own first."""
    found: dict[str, MakeChunks] = {}
    for name in ("triton", "flashinfer", "flash_attn_4"):
        try:
            found[name] = chunk_attention(Settings(attention_backend=name), scale.device, scale.dtype)
        except SettingsError as reason:
            print(reason, flush=True)
    return found


def prefill_call(scale: Scale, make_chunks: MakeChunks, shape: HeadShape, length: int) -> Callable[[], None]:
    num_blocks = -(-length // 16)
    kv = torch.randn(num_blocks, 2, shape.num_kv_heads, 16, shape.head_dim, device=scale.device).to(
        scale.dtype
    )
    q = torch.randn(length, shape.num_heads, shape.head_dim, device=scale.device).to(scale.dtype)
    out = torch.empty(length, shape.num_heads * shape.head_dim, dtype=scale.dtype, device=scale.device)
    layer = LayerAttention(q, 0, None, None, 1e-5)
    batch = one_prompt(scale.device, num_blocks, length)
    chunks = make_chunks(shape, scale.dtype)
    plan = chunks.plan(batch, batch.starts, np.array([True]))
    return lambda: chunks.attend(q, kv, layer, batch, plan, out)


def one_prompt(device: torch.device, num_blocks: int, length: int) -> Batch:
    """A step that computes a whole prompt, whose blocks lie in any order."""
    positions = torch.arange(length, device=device)
    return Batch(
        ids=positions,
        positions=positions,
        slot_mapping=positions,
        block_table=torch.randperm(num_blocks, device=device).to(torch.int32).view(1, num_blocks),
        lengths=torch.tensor([length], dtype=torch.int32, device=device),
        logit_index=torch.zeros(1, dtype=torch.int32, device=device),
        counts=np.array([length], np.int32),
        starts=np.zeros(1, np.int32),
        block_size=16,
    )


DECODES = [
    (64, 4, 3, 2),
    (64, 4, 3, 1),
    (64, 4, 3, 4),
    (64, 4, 3, 8),
    (64, 4, 2, 4),
    (128, 4, 2, 2),
    (128, 8, 2, 2),
    (32, 4, 4, 4),
]


PREFILLS = [
    (128, 64, 8, 3),
    (128, 64, 8, 2),
    (128, 64, 4, 3),
    (128, 128, 8, 2),
    (64, 64, 4, 3),
    (128, 32, 8, 3),
]


def tune(scale: Scale) -> Rows:
    """The attention kernels with other tiles, warps and stages: their files say which was chosen."""
    if not scale.is_gpu:
        return []
    shape = HeadShape(32, 8, 128)
    rows: Rows = []
    chosen = decode.TILE, decode.NUM_WARPS, decode.NUM_STAGES, decode.MIN_TILES, prefill.TUNED
    for choice in DECODES:
        decode.TILE, decode.NUM_WARPS, decode.NUM_STAGES, decode.MIN_TILES = choice
        row: dict[str, Any] = {"kernel": "decode", "choice": choice}
        for batch, context in ((1, 4096), (8, 1024), (64, 1024)):
            calls = [decode_call(scale, shape, batch, context, scale.dtype) for _ in range(4)]
            row[f"{batch} x {context}: us"] = scale.looped(calls) * 1e6
        rows.append(row)
        print(row, flush=True)
    for choice in PREFILLS:
        prefill.TUNED = prefill.Choice(*choice)
        row = {"kernel": "prefill", "choice": choice}
        try:
            row["4096: us"] = scale.looped([prefill_call(scale, TiledChunks, shape, 4096)] * 2) * 1e6
        except Exception as error:  # too much shared memory
            row["failed"] = type(error).__name__
        rows.append(row)
        print(row, flush=True)
    decode.TILE, decode.NUM_WARPS, decode.NUM_STAGES, decode.MIN_TILES, prefill.TUNED = chosen
    return rows


def measure_sampling(scale: Scale) -> Rows:
    """One token for each of a batch's rows, beside the time that reading the logits once would take."""
    rows = []
    vocabulary = 151_936 if scale.is_gpu else 99
    for batch in (1, 64, 256) if scale.is_gpu else (2,):
        logits = torch.randn(batch, vocabulary, device=scale.device) * 3
        for name, (temperature, k, p) in {
            "greedy": (0.0, 0, 1.0),
            "temperature": (0.8, 0, 1.0),
            "top-p": (0.8, 0, 0.95),
            "top-k, top-p": (0.8, 50, 0.95),
        }.items():
            full = partial(torch.full, (batch,), device=scale.device)
            rules = (
                full(temperature),
                full(k),
                full(p),
                full(0.0),
                full(7),
                torch.arange(batch, device=scale.device),
            )
            seconds = scale.looped([partial(sample, logits, *rules)] * 2)
            least = logits.nbytes / scale.limits["bytes_s"]
            rows.append(
                {"batch": batch, "rule": name, "us": seconds * 1e6, "times one read": seconds / least}
            )
    return rows
