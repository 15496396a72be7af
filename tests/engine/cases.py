"""Random decoder layers, whole steps through them, and random rows for the sampler: what the kernels of every
device are tried with.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from llvmlite import binding as llvm
from pagetide.ops.adapters import MATRICES, LayerAdapter, LowRank
from pagetide.ops.batch import Batch
from pagetide.ops.layers import Affine, Layers, LayerShape, LayerWeights, adapted_sizes
from pagetide.ops.weights import DenseWeight


def random_layers(
    shape: LayerShape, dtype: torch.dtype, window: int, has_norms: bool, has_bias: bool
) -> list[LayerWeights]:
    heads = shape.heads
    attended, qkv = (
        heads.num_heads * heads.head_dim,
        (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim,
    )

    def affine(outputs: int, inputs: int) -> Affine:
        values = (torch.randn(outputs, inputs) * inputs**-0.5).to(dtype)
        return Affine(DenseWeight(values), torch.randn(outputs).to(dtype) if has_bias else None)

    def norm(size: int) -> torch.Tensor:
        return torch.rand(size) + 0.5

    return [
        LayerWeights(
            attention_norm=norm(shape.hidden_size),
            qkv=affine(qkv, shape.hidden_size),
            q_norm=norm(heads.head_dim) if has_norms else None,
            k_norm=norm(heads.head_dim) if has_norms else None,
            window=window if index % 2 else 0,
            out=affine(shape.hidden_size, attended),
            mlp_norm=norm(shape.hidden_size),
            gate_up=affine(2 * shape.intermediate_size, shape.hidden_size),
            down=affine(shape.hidden_size, shape.intermediate_size),
            rotary=index % len(shape.cos_sin),
            post_attention_norm=norm(shape.hidden_size) if shape.heads.soft_cap else None,
            post_mlp_norm=norm(shape.hidden_size) if shape.heads.soft_cap else None,
        )
        for index in range(shape.num_layers)
    ]


def give_adapters(shape: LayerShape, *all_layers: Layers) -> None:
    """The same random adapters for each, some without a part, in places where larger ones have been."""

    def low_rank(name: str, rank: int) -> LowRank | None:
        outputs, inputs = adapted_sizes(shape)[name]
        if not rank:
            return None
        return LowRank(
            torch.randn(rank, inputs) * inputs**-0.5, torch.randn(outputs, rank) * 0.3 * rank**-0.5
        )

    room = shape.adapters
    for place in [*range(room.count), *range(room.count)]:
        adapter = [
            LayerAdapter(
                *(low_rank(name, int(torch.randint(room.rank_of(name) + 1, ()))) for name in MATRICES)
            )
            for _ in range(shape.num_layers)
        ]
        for layers in all_layers:
            layers.set_adapter(place, adapter)


def run_steps(
    layers: Layers,
    shape: LayerShape,
    lengths: list[list[int]],
    fill: float,
    dtype: torch.dtype,
    activations: torch.dtype = torch.float32,
) -> list[torch.Tensor]:
    """Residuals after each step; lengths[k][i]: tokens of sequence i in step k. Where there are adapters,
    sequence 0 has none, and the others have one after the other.

    The cache begins with nothing but `fill`.
    """
    block_size, device = shape.block_size, shape.cos_sin.device
    totals = np.sum(lengths, axis=0)
    blocks = -(-int(totals.max()) // block_size)
    order = torch.randperm(blocks * len(totals), generator=torch.Generator().manual_seed(1)).to(torch.int32)
    table = order.view(len(totals), blocks)
    pool = torch.full(
        (shape.num_layers, blocks * len(totals), *layers.block_shape), fill, dtype=dtype, device=device
    )
    starts, results = np.zeros(len(totals), np.int32), []
    noise = torch.Generator().manual_seed(2)
    for step in lengths:
        present = [i for i, count in enumerate(step) if count]
        counts = np.array([step[i] for i in present], np.int32)
        positions = torch.cat([torch.arange(starts[i], starts[i] + step[i]) for i in present])
        owner = torch.repeat_interleave(torch.tensor(present), torch.from_numpy(counts).long())
        slots = table[owner, positions // block_size].long() * block_size + positions % block_size
        residual = torch.randn(len(positions), shape.hidden_size, generator=noise).to(device, activations)
        ends = torch.from_numpy(starts[present] + counts)
        tensors = [
            tensor.to(device)
            for tensor in (positions, positions, slots, table[present].contiguous(), ends, positions)
        ]
        adapters = owner % (shape.adapters.count + 1) - 1 if shape.adapters.count else None
        batch = Batch(*tensors, counts, starts[present], block_size, adapters)
        layers(residual, batch, pool)
        results.append(residual.cpu())
        starts += np.array(step, np.int32)
    return results


def rotary_like(length: int, head_dim: int, bases: tuple[int, ...] = (1000,)) -> torch.Tensor:
    """A table for each base."""
    exponents = torch.arange(0, head_dim, 2) / head_dim
    angles = torch.stack([torch.outer(torch.arange(length).float(), base**-exponents) for base in bases])
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def capped_shape(shape: LayerShape) -> LayerShape:
    """The same sizes with all that Gemma's layers have: scores that cannot exceed a limit, GELU, another
    table of angles for every second layer (and norms behind, in random_layers).
    """
    length, head_dim = shape.cos_sin.shape[1:]
    return replace(
        shape,
        heads=replace(shape.heads, query_size=3.0, soft_cap=2.0),
        cos_sin=rotary_like(length, head_dim, (1000, 70)).to(shape.cos_sin.device),
        activation="gelu",
    )


def random_rows(rng: np.random.Generator, num_rows: int, vocabulary: int) -> tuple[torch.Tensor, ...]:
    """history of more rows than are looked at, the rows, their lengths, and how much of that is prompt;
    what lies behind is poison.
    """
    history = torch.from_numpy(rng.integers(0, vocabulary, (num_rows + 3, 40)))
    rows = torch.from_numpy(rng.permutation(num_rows + 3)[:num_rows].copy())
    positions = torch.from_numpy(rng.integers(1, 40, num_rows))
    num_prompt = torch.from_numpy(rng.integers(1, positions.numpy() + 1))
    for row, position in zip(rows.tolist(), positions.tolist(), strict=True):
        history[row, position:] = vocabulary - 1
    return history, rows, positions, num_prompt


def run_on_older_processor(file: str, tests: list[str], without: str = "avx512") -> None:
    """Runs tests of a file in a process of its own, with kernels compiled for a processor without the
    features whose names begin so; skips where this one has none of them, since the file itself shows it.
    """
    features = {name for name, is_there in llvm.get_host_cpu_features().items() if is_there}
    if not any(name.startswith(without) for name in features):
        pytest.skip(f"this processor has no {without}: the other tests show it")
    older = ",".join(("-" if name.startswith(without) else "+") + name for name in sorted(features))
    name = "haswell" if without == "avx512" else "skylake-avx512"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    result = subprocess.run(
        [*command, *(f"{Path(file)}::{test}" for test in tests)],
        env={**os.environ, "NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": older},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
