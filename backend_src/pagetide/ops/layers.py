"""A decoder's layers as one operation: what every device's version takes, and the version that composes it
of small ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch

from pagetide.ops.adapters import MATRICES, NO_ADAPTERS, AdapterRoom, LayerAdapter, LowRank
from pagetide.ops.attention import AttentionBackend, HeadShape, LayerAttention
from pagetide.ops.batch import Batch
from pagetide.ops.comm import ALONE, Comm
from pagetide.ops.weights import Weight, device_of, dtype_of

Tensor = torch.Tensor


@dataclass(frozen=True)
class LayerShape:
    """Sizes that all layers share. cos_sin: float32 [tables, max_len, head_dim], of which LayerAttention's is
    one. activation: as LayerOps.gated takes it. kv_dtype: of the KV pool; uint8: keys and
    values are 8-bit integers with scales of their own, float8_e4m3fn: they are divided by those of the layer.
    comm: to the ranks that have the other heads and the rest of the MLP's width; what the last matrices of
    attention and MLP give is a part of a sum over them. adapters: that lie beside the layers.
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
    adapters: AdapterRoom = NO_ADAPTERS


def adapted_sizes(shape: LayerShape) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of each of MATRICES."""
    heads, hidden, width = shape.heads, shape.hidden_size, shape.intermediate_size
    queries, kept = heads.num_heads * heads.head_dim, heads.num_kv_heads * heads.head_dim
    return {
        "qkv": (queries + 2 * kept, hidden),
        "out": (hidden, queries),
        "gate_up": (2 * width, hidden),
        "down": (hidden, width),
    }


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

    def set_adapter(self, index: int, layers: Iterable[LayerAdapter]) -> None:
        """Puts an adapter, layer after layer, into a place below AdapterRoom.count, for the next call."""

    def __call__(self, residual: Tensor, batch: Batch, pool: Tensor) -> None:
        """Runs the step's tokens through all layers, in place; residual [t, hidden].

        Keys and values go into the pool [num_layers, num_blocks, *block_shape].
        """


# A matrix product with a bias: [t, in] -> [t, out]
Matmul: TypeAlias = Callable[[Tensor], Tensor]


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
        self._block_size, self._activation = shape.block_size, shape.activation
        self._room = shape.adapters
        self._attention = ops.make_attention(shape.heads)
        self._layers = [_Layer(ops, shape, weights) for weights in layers]

    is_deterministic = False

    @property
    def block_shape(self) -> tuple[int, ...]:
        return self._attention.block_shape(self._block_size)

    def set_adapter(self, index: int, layers: Iterable[LayerAdapter]) -> None:
        for layer, added in zip(self._layers, layers, strict=True):
            for name in MATRICES:
                getattr(layer, name).set_adapter(index, getattr(added, name))

    def __call__(self, residual: Tensor, batch: Batch, pool: Tensor) -> None:
        add_rms_norm, attention, comm = self._ops.add_rms_norm, self._attention, self._comm
        plan = attention.plan(batch)
        others = self._others(batch)
        update = None
        for layer, kv in zip(self._layers, pool, strict=True):
            x = add_rms_norm(update, residual, layer.attention_norm, self._eps)
            q = attention.write(layer.qkv(x, others), kv, layer.attention, batch)
            update = layer.out(attention.attend(q, kv, layer.attention, batch, plan), others)
            comm.all_reduce(update)
            if layer.post_attention_norm is not None:
                update = add_rms_norm(None, update, layer.post_attention_norm, self._eps)
            x = add_rms_norm(update, residual, layer.mlp_norm, self._eps)
            gated = self._ops.gated(layer.gate_up(x, others), self._activation)
            update = layer.down(gated, others)
            comm.all_reduce(update)
            if layer.post_mlp_norm is not None:
                update = add_rms_norm(None, update, layer.post_mlp_norm, self._eps)
        if update is not None:
            residual += update

    def _others(self, batch: Batch) -> Tensor | None:
        """Which adapters a token does not have: bool [t, adapters]; None where no token has any."""
        if batch.adapters is None:
            return None
        numbers = torch.arange(self._room.count, device=batch.adapters.device)
        return batch.adapters[:, None] != numbers


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
        self.qkv, self.out, self.gate_up, self.down = (
            _Product(ops, getattr(weights, name), shape.adapters, name) for name in MATRICES
        )


class _Product:
    """A matrix product, and what each token's adapter adds to it.

    The matrices of all adapters are multiplied as one, and what is not of a token's own is cleared in
    between: the same work in every step, so that it can be recorded.
    """

    def __init__(self, ops: LayerOps, affine: Affine, room: AdapterRoom, name: str):
        self._matmul = ops.make_matmul(affine)
        self._sizes = room.count, room.rank_of(name)
        (outputs, inputs), rank = affine.weight.shape, room.count * room.rank_of(name)
        dtype, device = dtype_of(affine.weight), device_of(affine.weight)
        self._down = torch.zeros((rank, inputs), dtype=dtype, device=device)
        self._up = torch.zeros((outputs, rank), dtype=dtype, device=device)

    def set_adapter(self, index: int, added: LowRank | None) -> None:
        down = self._down.unflatten(0, self._sizes)[index].zero_()
        up = self._up.unflatten(1, self._sizes)[:, index].zero_()
        if added is not None:
            rank = len(added.down)
            down[:rank], up[:, :rank] = added.down, added.up

    def __call__(self, x: Tensor, others: Tensor | None) -> Tensor:
        """[t, in] -> [t, out]. others: bool [t, adapters], those that a token does not have; None: all."""
        result = self._matmul(x)
        if others is not None:
            hidden = torch.nn.functional.linear(x.to(self._down.dtype), self._down).unflatten(1, self._sizes)
            hidden = hidden.masked_fill_(others[:, :, None], 0).flatten(1)
            result += torch.nn.functional.linear(hidden, self._up)
        return result


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
