"""A decoder's layers as one operation: what every device's version takes, and the version that composes it
of small ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch

from pagetide.ops.attention import AttentionBackend, HeadShape, LayerAttention
from pagetide.ops.batch import Batch
from pagetide.ops.comm import ALONE, Comm
from pagetide.ops.weights import Weight

Tensor = torch.Tensor


@dataclass(frozen=True)
class LayerShape:
    """Sizes that all layers share. cos_sin: float32 [tables, max_len, head_dim], of which LayerAttention's is
    one. activation: as LayerOps.gated takes it. kv_dtype: of the KV pool; uint8: keys and
    values are 8-bit integers with scales of their own, float8_e4m3fn: they are divided by those of the layer.
    comm: to the ranks that have the other heads and the rest of the MLP's width; what the last matrices of
    attention and MLP give is a part of a sum over them.
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    heads: HeadShape
    block_size: int
    eps: float
    cos_sin: Tensor
    kv_dtype: torch.dtype = torch.bfloat16
    comm: Comm = ALONE
    activation: str = "silu"


@dataclass(frozen=True)
class Affine:
    """weight [out, in], bias [out] or None."""

    weight: Weight
    bias: Tensor | None


@dataclass(frozen=True)
class LayerWeights:
    """One layer of a pre-norm decoder.

    qkv: queries, keys, values; gate_up: gate, then up; window, k_scale, v_scale as LayerAttention's. rotary:
    which of LayerShape's tables. post_attention_norm, post_mlp_norm: of what attention and MLP add to the
    residual, or None.
    """

    attention_norm: Tensor
    qkv: Affine
    q_norm: Tensor | None
    k_norm: Tensor | None
    window: int
    out: Affine
    mlp_norm: Tensor
    gate_up: Affine
    down: Affine
    k_scale: float = 1.0
    v_scale: float = 1.0
    rotary: int = 0
    post_attention_norm: Tensor | None = None
    post_mlp_norm: Tensor | None = None


class Layers(Protocol):
    """All layers of a decoder."""

    @property
    def block_shape(self) -> tuple[int, ...]:
        """The shape of a block of one layer of the KV pool (KVLayout)."""

    @property
    def is_deterministic(self) -> bool:
        """Whether a token's result is the same to the last bit whatever else its step has."""

    def __call__(self, residual: Tensor, batch: Batch, pool: Tensor) -> None:
        """Runs the step's tokens through all layers, in place; residual [t, hidden].

        Keys and values go into the pool [num_layers, num_blocks, *block_shape].
        """


class Matmul(Protocol):
    """A matrix product with a bias; it sees the batch, since rows may have different adapters."""

    def __call__(self, x: Tensor, batch: Batch) -> Tensor:
        """[t, in] -> [t, out]"""


@dataclass(frozen=True)
class LayerOps:
    """What ComposedLayers is made of; shapes are those of ops/reference.py."""

    add_rms_norm: Callable[[Tensor | None, Tensor, Tensor, float], Tensor]
    gated: Callable[[Tensor, str], Tensor]
    make_matmul: Callable[[Affine], Matmul]
    make_attention: Callable[[HeadShape], AttentionBackend]


class ComposedLayers:
    """Layers of a decoder with rotary attention and SwiGLU MLP (Llama, arXiv:2302.13971), one operation
    after the other.
    """

    def __init__(self, ops: LayerOps, shape: LayerShape, layers: Iterable[LayerWeights]):
        self._ops = ops
        self._eps = shape.eps
        self._comm = shape.comm
        self._block_size = shape.block_size
        self._attention = ops.make_attention(shape.heads)
        self._layers = [_Layer(ops, shape, weights) for weights in layers]

    is_deterministic = False

    @property
    def block_shape(self) -> tuple[int, ...]:
        return self._attention.block_shape(self._block_size)

    def __call__(self, residual: Tensor, batch: Batch, pool: Tensor) -> None:
        add_rms_norm, attention, comm = self._ops.add_rms_norm, self._attention, self._comm
        plan = attention.plan(batch)
        update = None
        for layer, kv in zip(self._layers, pool, strict=True):
            x = add_rms_norm(update, residual, layer.attention_norm, self._eps)
            q = attention.write(layer.qkv(x, batch), kv, layer.attention, batch)
            update = layer.out(attention.attend(q, kv, layer.attention, batch, plan), batch)
            comm.all_reduce(update)
            if layer.post_attention_norm is not None:
                update = add_rms_norm(None, update, layer.post_attention_norm, self._eps)
            x = add_rms_norm(update, residual, layer.mlp_norm, self._eps)
            update = layer.mlp(x, batch)
            comm.all_reduce(update)
            if layer.post_mlp_norm is not None:
                update = add_rms_norm(None, update, layer.post_mlp_norm, self._eps)
        if update is not None:
            residual += update


class _Layer:
    def __init__(self, ops: LayerOps, shape: LayerShape, weights: LayerWeights):
        self.attention_norm, self.mlp_norm = weights.attention_norm, weights.mlp_norm
        self.post_attention_norm, self.post_mlp_norm = weights.post_attention_norm, weights.post_mlp_norm
        self.attention = LayerAttention(
            shape.cos_sin[weights.rotary],
            weights.window,
            weights.q_norm,
            weights.k_norm,
            shape.eps,
            weights.k_scale,
            weights.v_scale,
        )
        self.qkv, self.out = ops.make_matmul(weights.qkv), ops.make_matmul(weights.out)
        self.mlp = GatedMlp(ops, weights, shape.activation)


class GatedMlp:
    """SwiGLU, GeGLU (arXiv:2002.05202)."""

    def __init__(self, ops: LayerOps, weights: LayerWeights, activation: str):
        self._gated, self._activation = ops.gated, activation
        self._gate_up, self._down = ops.make_matmul(weights.gate_up), ops.make_matmul(weights.down)

    def __call__(self, x: Tensor, batch: Batch) -> Tensor:
        """[t, hidden] -> [t, hidden]"""
        return self._down(self._gated(self._gate_up(x, batch), self._activation), batch)


class Embedding(Protocol):
    """The first and the last matrix of a decoder, often one and the same, and the norm before the last."""

    def embed(self, ids: Tensor) -> Tensor:
        """int64 [t] -> [t, hidden], in the type that the layers take."""

    def logits(self, residual: Tensor) -> Tensor:
        """[s, hidden], not normalized -> float32 [s, vocabulary], in memory that the next call may use
        again.
        """


@dataclass(frozen=True)
class EmbeddingWeights:
    """embedding, head [vocabulary, hidden]; head is None where the embedding serves as both.

    norm [hidden].
    """

    embedding: Weight
    head: Weight | None
    norm: Tensor
    eps: float
