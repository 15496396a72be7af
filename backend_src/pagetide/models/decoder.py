"""THE decoder: every family of models.families is this class with other sizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import torch

from pagetide.kv_cache.layout import KVLayout
from pagetide.models.adapters import layer_adapter
from pagetide.models.config import DecoderConfig
from pagetide.models.families import Family
from pagetide.models.rotary import in_halves, rotary_size, rotary_tables
from pagetide.models.sharding import Shard, ShardedEmbedding
from pagetide.models.weights import Tensors
from pagetide.ops.adapters import NO_ADAPTERS, AdapterRoom, LayerAdapter
from pagetide.ops.attention import HeadShape
from pagetide.ops.batch import Batch
from pagetide.ops.comm import ALONE, Comm
from pagetide.ops.layers import Affine, Embedding, EmbeddingWeights, LayerShape, LayerWeights
from pagetide.ops.table import Ops
from pagetide.ops.weights import DenseWeight, rearranged


class Decoder:
    """Pre-norm transformer decoder with rotary attention and SwiGLU MLP (Llama, arXiv:2302.13971), or one
    rank's part of it, its weights read from a checkpoint.
    """

    def __init__(
        self,
        shard: Shard,
        family: Family,
        checkpoint: Tensors,
        ops: Ops,
        shape: LayerShape,
        activations: torch.dtype,
    ):
        self._config, self._family, self._checkpoint = shard.model, family, checkpoint
        self._shard, self._activations, self._kv_dtype = shard, activations, shape.kv_dtype
        self.has_adapters = shape.adapters.count > 0
        self.layers = ops.make_layers(shape, self._read_layers())
        tables = self._read_embedding()
        self._embedding: Embedding = ops.make_embedding(shard.embedding(tables))
        self._embedding_scale = _embedding_scale(shard.model, family, tables)
        if shard.size > 1:
            self._embedding = ShardedEmbedding(self._embedding, shard.vocabulary, shape.comm)

    def kv_layout(self) -> KVLayout:
        """The cache that forward() takes."""
        return KVLayout(self._config.num_layers, self.layers.block_shape, self._kv_dtype)

    def forward(self, batch: Batch, pool: torch.Tensor) -> torch.Tensor:
        """Runs the step's tokens; their keys and values go into the pool.

        Returns logits float32 [s, vocab_size], on rank 0; anything on other ranks.
        """
        residual = self._embedding.embed(batch.ids)
        if self._embedding_scale != 1:
            residual *= self._embedding_scale
        self.layers(residual, batch, pool)
        logits = self._embedding.logits(residual[batch.logit_index])
        if cap := self._config.logit_soft_cap:
            logits.div_(cap).tanh_().mul_(cap)
        return logits

    def set_adapter(self, index: int, tensors: Mapping[str, np.ndarray]) -> None:
        """Puts an adapter, as models.adapters reads it, into one of the places for them."""
        config, shard = self._config, self._shard
        whole = (layer_adapter(tensors, layer, self._family, config) for layer in range(config.num_layers))
        self.layers.set_adapter(
            index, (shard.adapter(self._turned(layer, at)) for at, layer in enumerate(whole))
        )

    def _turned(self, adapter: LayerAdapter, index: int) -> LayerAdapter:
        """Its rows in the order of the model's (_qkv_in_halves)."""
        turned = self._rotary_size(index)
        if adapter.qkv is None or turned == self._config.head_dim:
            return adapter
        return replace(
            adapter, qkv=replace(adapter.qkv, up=_rows_in_halves(adapter.qkv.up, self._config, turned))
        )

    def _rotary_size(self, index: int) -> int:
        """How many elements of a layer's heads turn."""
        config = self._config
        return rotary_size(config.ropes[config.rope_of_layer[index]], config.head_dim)

    def _read_embedding(self) -> EmbeddingWeights:
        family = self._family
        is_tied = self._config.tie_embeddings or not self._checkpoint.has(family.head)
        size = self._config.vocab_size  # the checkpoint's matrices may be padded beyond it
        return EmbeddingWeights(
            embedding=self._checkpoint.read_table(family.embedding, size, is_head=is_tied),
            head=None if is_tied else self._checkpoint.read_table(family.head, size, is_head=True),
            norm=self._read_norm(family.final_norm),
            eps=self._config.norm_eps,
        )

    def _read_layers(self) -> Iterator[LayerWeights]:
        """One after the other: a device that stores them in another form never needs room for both."""
        for index in range(self._config.num_layers):
            yield self._shard.layer(self._read_layer(index))

    def _read_norm(self, name: str) -> torch.Tensor:
        """In float32 where one is added: what is near to one has few bits of its own in others."""
        weight, offset = self._checkpoint.read(f"{name}.weight"), self._family.norm_offset
        return weight.float() + offset if offset else weight.to(self._activations)

    def _read_layer(self, index: int) -> LayerWeights:
        family, config = self._family, self._config
        prefix = family.layer.format(index)
        turned = self._rotary_size(index)

        def affine(*names: str) -> Affine:
            full = tuple(prefix + name for name in names)
            return Affine(self._checkpoint.read_weight(full), self._checkpoint.read_bias(full))

        def norm(name: str) -> torch.Tensor:
            return self._read_norm(prefix + name)

        def norm_if(name: str) -> torch.Tensor | None:
            return norm(name) if name else None

        qkv = affine(*family.qkv)
        q_norm, k_norm = (norm(family.q_norm), norm(family.k_norm)) if config.qk_norm else (None, None)
        if turned < config.head_dim:
            qkv = _qkv_in_halves(qkv, config, turned)
            q_norm, k_norm = (
                None if weight is None else in_halves(weight[None], turned)[0] for weight in (q_norm, k_norm)
            )
        k_scale, v_scale = 1.0, 1.0
        if self._kv_dtype is torch.float8_e4m3fn:
            k_scale, v_scale = (self._checkpoint.read_scale(prefix + name) for name in family.kv_scales)
        return LayerWeights(
            attention_norm=norm(family.attention_norm),
            qkv=qkv,
            q_norm=q_norm,
            k_norm=k_norm,
            window=config.windows[index],
            rotary=config.rope_of_layer[index],
            out=affine(family.out),
            mlp_norm=norm(family.mlp_norm),
            gate_up=affine(*family.gate_up),
            down=affine(family.down),
            k_scale=k_scale,
            v_scale=v_scale,
            post_attention_norm=norm_if(family.post_attention_norm),
            post_mlp_norm=norm_if(family.post_mlp_norm),
        )


def _embedding_scale(config: DecoderConfig, family: Family, tables: EmbeddingWeights) -> float:
    """Rounded as models with such a scale have been trained with it."""
    if not family.scales_embedding:
        return 1.0
    weight = tables.embedding
    dtype = weight.values.dtype if isinstance(weight, DenseWeight) else torch.bfloat16
    return float(torch.tensor(config.hidden_size**0.5, dtype=dtype))


def _qkv_in_halves(qkv: Affine, config: DecoderConfig, turned: int) -> Affine:
    """Queries and keys of which only a part turns, as rotary.in_halves has them."""

    def order(rows: torch.Tensor) -> torch.Tensor:
        return _rows_in_halves(rows, config, turned)

    return Affine(rearranged(qkv.weight, order), None if qkv.bias is None else order(qkv.bias))


def _rows_in_halves(rows: torch.Tensor, config: DecoderConfig, turned: int) -> torch.Tensor:
    """[out of queries, keys and values, ...]"""
    num_turned = config.num_heads + config.num_kv_heads
    heads = rows.unflatten(0, (-1, config.head_dim))
    return torch.cat([in_halves(heads[:num_turned], turned), heads[num_turned:]]).flatten(0, 1)


def layer_shape(
    config: DecoderConfig,
    block_size: int,
    max_len: int,
    device: torch.device,
    kv_dtype: torch.dtype,
    comm: Comm = ALONE,
    adapters: AdapterRoom = NO_ADAPTERS,
) -> LayerShape:
    """The sizes of a model's layers, or of one rank's part of them. max_len: the longest sequence, in
    tokens; kv_dtype, adapters: as LayerShape's.
    """
    return LayerShape(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        heads=HeadShape(
            config.num_heads, config.num_kv_heads, config.head_dim, config.query_size, config.soft_cap
        ),
        activation=config.activation,
        block_size=block_size,
        eps=config.norm_eps,
        cos_sin=rotary_tables(config, max_len, device),
        kv_dtype=kv_dtype,
        comm=comm,
        adapters=adapters,
    )
