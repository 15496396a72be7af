"""The operations of a GPU: kernels in the Triton language, matrix products by them or by cuBLAS."""

from __future__ import annotations

from functools import partial

import torch

from pagetide.ops import reference
from pagetide.ops.gpu.activation import gated
from pagetide.ops.gpu.attention import MakeChunks, PagedAttention, TiledChunks
from pagetide.ops.gpu.choices import Choices
from pagetide.ops.gpu.copies import copy_blocks
from pagetide.ops.gpu.embedding import GpuEmbedding
from pagetide.ops.gpu.gather import gather, set_blocks
from pagetide.ops.gpu.logits import Penalties, edit, mask
from pagetide.ops.gpu.matmul import make_matmul
from pagetide.ops.gpu.norm import add_rms_norm
from pagetide.ops.gpu.sampling import argmax, sample
from pagetide.ops.layers import ComposedLayers, LayerOps
from pagetide.ops.table import Ops


def gpu_layers(dtype: torch.dtype, choices: Choices, make_chunks: MakeChunks = TiledChunks) -> LayerOps:
    """What a layer is made of."""
    products = partial(make_matmul, choices, dtype)
    return LayerOps(add_rms_norm, gated, products, partial(PagedAttention, dtype, make_chunks))


def make_gpu_ops(dtype: torch.dtype, choices: Choices, make_chunks: MakeChunks = TiledChunks) -> Ops:
    """dtype: of activations, queries, and all that is not quantized: bfloat16, float16 or float32.

    make_chunks: what attends to prompt chunks.
    """
    return Ops(
        can_record=True,
        gather=gather,
        make_embedding=partial(GpuEmbedding, choices, dtype),
        make_layers=partial(ComposedLayers, gpu_layers(dtype, choices, make_chunks)),
        argmax=argmax,
        sample=sample,
        penalize=Penalties(),
        edit=edit,
        mask=mask,
        copy_blocks=copy_blocks,
        set_blocks=set_blocks,
        score=reference.score,
    )
