"""The set of functions that one device uses.

Chosen once, at load (ops/select.py); it travels as an object in constructors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from pagetide.ops.layers import Embedding, EmbeddingWeights, Layers, LayerShape, LayerWeights

Tensor = torch.Tensor


@dataclass(frozen=True)
class Ops:
    """Signatures and shapes are those of ops/reference.py and ops/layers.py."""

    can_record: (
        bool  # a step's launches depend on the sizes of its batch only: the rest is read on the device
    )
    gather: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]
    make_embedding: Callable[[EmbeddingWeights], Embedding]
    make_layers: Callable[[LayerShape, Iterable[LayerWeights]], Layers]
    argmax: Callable[[Tensor], Tensor]
    sample: Callable[..., Tensor]
    penalize: Callable[..., None]
    edit: Callable[..., None]
    mask: Callable[[Tensor, Tensor, Tensor, Tensor], None]
    copy_blocks: Callable[[Tensor, Tensor, Tensor], None]
    set_blocks: Callable[[Tensor, Tensor, Tensor, Tensor], None]
    score: Callable[[Tensor, Tensor, int], list[Tensor]]
