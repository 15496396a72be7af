"""THE decoder: every family of models.families is this class with other sizes."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pagetide.kv_cache.layout import KVLayout
from pagetide.models.config import DecoderConfig
from pagetide.models.families import Family
from pagetide.models.rotary import rotary_table
from pagetide.models.sharding import Shard, ShardedEmbedding
from pagetide.models.weights import Tensors
from pagetide.ops.attention import HeadShape
from pagetide.ops.batch import Batch
from pagetide.ops.comm import ALONE, Comm
from pagetide.ops.layers import Affine, Embedding, EmbeddingWeights, LayerShape, LayerWeights
from pagetide.ops.table import Ops


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
        self.layers = ops.make_layers(shape, self._read_layers())
        self._embedding: Embedding = ops.make_embedding(shard.embedding(self._read_embedding()))
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
        self.layers(residual, batch, pool)
        return self._embedding.logits(residual[batch.logit_index])

    def _read_embedding(self) -> EmbeddingWeights:
        family = self._family
        is_tied = self._config.tie_embeddings or not self._checkpoint.has(family.head)
        size = self._config.vocab_size  # the checkpoint's matrices may be padded beyond it
        return EmbeddingWeights(
            embedding=self._checkpoint.read_table(family.embedding, size, is_head=is_tied),
            head=None if is_tied else self._checkpoint.read_table(family.head, size, is_head=True),
            norm=self._checkpoint.read(f"{family.final_norm}.weight").to(self._activations),
            eps=self._config.norm_eps,
        )

    def _read_layers(self) -> Iterator[LayerWeights]:
        """One after the other: a device that stores them in another form never needs room for both."""
        for index in range(self._config.num_layers):
            whole = self._read_layer(self._family.layer.format(index), self._config.windows[index])
            yield self._shard.layer(whole)

    def _read_layer(self, prefix: str, window: int) -> LayerWeights:
        family = self._family

        def affine(*names: str) -> Affine:
            full = tuple(prefix + name for name in names)
            return Affine(self._checkpoint.read_weight(full), self._checkpoint.read_bias(full))

        def norm(name: str) -> torch.Tensor:
            return self._checkpoint.read(f"{prefix}{name}.weight").to(self._activations)

        q_norm, k_norm = (norm(family.q_norm), norm(family.k_norm)) if self._config.qk_norm else (None, None)
        k_scale, v_scale = 1.0, 1.0
        if self._kv_dtype is torch.float8_e4m3fn:
            k_scale, v_scale = (self._checkpoint.read_scale(prefix + name) for name in family.kv_scales)
        return LayerWeights(
            attention_norm=norm(family.attention_norm),
            qkv=affine(*family.qkv),
            q_norm=q_norm,
            k_norm=k_norm,
            window=window,
            out=affine(family.out),
            mlp_norm=norm(family.mlp_norm),
            gate_up=affine(*family.gate_up),
            down=affine(family.down),
            k_scale=k_scale,
            v_scale=v_scale,
        )


def layer_shape(
    config: DecoderConfig,
    block_size: int,
    max_len: int,
    device: torch.device,
    kv_dtype: torch.dtype,
    comm: Comm = ALONE,
) -> LayerShape:
    """The sizes of a model's layers, or of one rank's part of them. max_len: the longest sequence, in
    tokens; kv_dtype: as LayerShape's.
    """
    return LayerShape(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        heads=HeadShape(config.num_heads, config.num_kv_heads, config.head_dim),
        block_size=block_size,
        eps=config.norm_eps,
        cos_sin=rotary_table(config, max_len, device),
        kv_dtype=kv_dtype,
        comm=comm,
    )
