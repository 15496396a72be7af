"""THE decoder: every family of models.families is this class with other sizes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pagetide.models.config import DecoderConfig
from pagetide.models.families import Family
from pagetide.models.linear import Linear
from pagetide.models.rotary import rotary_table
from pagetide.models.weights import Checkpoint
from pagetide.ops.attention import HeadShape, LayerAttention
from pagetide.ops.batch import Batch
from pagetide.ops.table import Ops


@dataclass(frozen=True)
class Layer:
    """Weights of one decoder layer. qkv and gate_up are one matrix each."""

    attention_norm: torch.Tensor
    qkv: Linear
    attention: LayerAttention
    out: Linear
    mlp_norm: torch.Tensor
    gate_up: Linear
    down: Linear


class Decoder:
    """Pre-norm transformer decoder with rotary attention and SwiGLU MLP (Llama, arXiv:2302.13971)."""

    def __init__(self, config: DecoderConfig, family: Family, checkpoint: Checkpoint, ops: Ops, max_len: int, activations: torch.dtype):
        self._ops = ops
        self._eps = config.norm_eps
        self._activations = activations
        self._attention = ops.make_attention(HeadShape(config.num_heads, config.num_kv_heads, config.head_dim))
        self._embedding = checkpoint.read(f"{family.embedding}.weight")
        cos_sin = rotary_table(config, max_len, self._embedding.device)
        self._layers = [self._load_layer(i, config, family, checkpoint, cos_sin) for i in range(config.num_layers)]
        self._norm = checkpoint.read(f"{family.final_norm}.weight").to(activations)
        is_tied = config.tie_embeddings or f"{family.head}.weight" not in checkpoint
        self._head = Linear(self._embedding if is_tied else checkpoint.read(f"{family.head}.weight"), None, ops)

    def _load_layer(self, index: int, config: DecoderConfig, family: Family, checkpoint: Checkpoint, cos_sin: torch.Tensor) -> Layer:
        prefix = family.layer.format(index)

        def linear(*names: str) -> Linear:
            full = tuple(prefix + name for name in names)
            weight = checkpoint.read_merged(full, "weight")
            assert weight is not None, full
            return Linear(weight, checkpoint.read_merged(full, "bias"), self._ops)

        def norm(name: str) -> torch.Tensor:
            return checkpoint.read(f"{prefix}{name}.weight").to(self._activations)

        q_norm, k_norm = (norm(family.q_norm), norm(family.k_norm)) if config.qk_norm else (None, None)
        return Layer(
            attention_norm=norm(family.attention_norm),
            qkv=linear(*family.qkv),
            attention=LayerAttention(cos_sin, config.windows[index], q_norm, k_norm, config.norm_eps),
            out=linear(family.out),
            mlp_norm=norm(family.mlp_norm),
            gate_up=linear(*family.gate_up),
            down=linear(family.down),
        )

    def forward(self, batch: Batch, pool: torch.Tensor) -> torch.Tensor:
        """Runs the step's tokens; their keys and values go into the pool (KVLayout). Returns logits float32 [s, vocab_size]."""
        batch.attention = self._attention.plan(batch)
        residual = self._embedding[batch.ids].to(self._activations)
        update = torch.zeros_like(residual)
        for layer, kv in zip(self._layers, pool, strict=True):
            update = self._attend(layer, self._ops.add_rms_norm(update, residual, layer.attention_norm, self._eps), kv, batch)
            update = self._mlp(layer, self._ops.add_rms_norm(update, residual, layer.mlp_norm, self._eps))
        sampled, update = residual[batch.logit_index], update[batch.logit_index]
        return self._head(self._ops.add_rms_norm(update, sampled, self._norm, self._eps)).float()

    def _attend(self, layer: Layer, x: torch.Tensor, kv: torch.Tensor, batch: Batch) -> torch.Tensor:
        q = self._attention.write(layer.qkv(x), kv, layer.attention, batch)
        return layer.out(self._attention.attend(q, kv, layer.attention, batch))

    def _mlp(self, layer: Layer, x: torch.Tensor) -> torch.Tensor:
        return layer.down(self._ops.silu_mul(layer.gate_up(x)))
