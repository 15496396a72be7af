"""The operations of a CPU: Numba kernels on packed weights, for every model whose sizes they can take."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch

from pagetide.config import SettingsError
from pagetide.ops import reference
from pagetide.ops.cpu.embedding import CompiledEmbedding
from pagetide.ops.cpu.gather import gather
from pagetide.ops.cpu.kept import Keeper, no_keeper
from pagetide.ops.cpu.layers import CompiledLayers, can_run
from pagetide.ops.cpu.logits import edit, mask, penalize
from pagetide.ops.cpu.packing import GROUP
from pagetide.ops.cpu.sampling import argmax, sample, score
from pagetide.ops.layers import ComposedLayers, Embedding, EmbeddingWeights, Layers, LayerShape, LayerWeights
from pagetide.ops.plain import TORCH_LAYERS, TorchEmbedding
from pagetide.ops.table import Ops


def make_cpu_ops(keep: Keeper = no_keeper) -> Ops:
    """Activations are float32 or bfloat16, weights and KV bfloat16 or float32. keep: of packed weights."""
    return Ops(
        can_record=False,
        gather=gather,
        make_embedding=partial(make_embedding, keep),
        make_layers=partial(make_layers, keep),
        argmax=argmax,
        sample=sample,
        penalize=penalize,
        edit=edit,
        mask=mask,
        copy_blocks=reference.copy_blocks,
        set_blocks=reference.set_blocks,
        score=score,
    )


def make_embedding(keep: Keeper, weights: EmbeddingWeights) -> Embedding:
    """Compiled where the hidden size allows it, plain torch otherwise."""
    return TorchEmbedding(weights) if weights.embedding.shape[1] % GROUP else CompiledEmbedding(weights, keep)


def make_layers(keep: Keeper, shape: LayerShape, layers: Iterable[LayerWeights]) -> Layers:
    """Compiled where the sizes allow it, plain torch otherwise. Raises SettingsError."""
    if can_run(shape):
        return CompiledLayers(shape, layers, keep)
    if shape.kv_dtype is torch.uint8:
        raise SettingsError(
            "kv_cache_dtype is int8, which needs a block_size in whole 16s and a model whose sizes the CPU's "
            "kernels take; use auto"
        )
    return ComposedLayers(TORCH_LAYERS, shape, layers)
