"""What attention's scores are multiplied by, and what they cannot exceed, for softmax by powers of two."""

from __future__ import annotations

import triton
import triton.language as tl

from pagetide.ops.attention import HeadShape, LayerAttention

_LOG2_E = 1.4426950408889634


def score_factor(shape: HeadShape, layer: LayerAttention) -> float:
    """Of products of queries and keys as the cache has them."""
    return shape.scale * _LOG2_E * layer.k_scale


def score_limit(shape: HeadShape) -> float:
    """Of scores that have been multiplied by score_factor; 0: none."""
    return shape.soft_cap * _LOG2_E


@triton.jit
def capped(scores, LIMIT: tl.constexpr):
    """LIMIT * tanh(scores / LIMIT) (arXiv:2408.00118)."""
    return LIMIT - 2 * LIMIT / (1 + tl.exp(scores * (2 / LIMIT)))
