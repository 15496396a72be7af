"""Layers by a GPU's kernels against torch's."""

from __future__ import annotations

from dataclasses import replace

import torch
from cases import give_adapters, random_layers, run_steps
from interpreted import DEVICE
from pagetide.ops.gpu.attention import TiledChunks
from pagetide.ops.gpu.choices import Choices
from pagetide.ops.gpu.table import gpu_layers
from pagetide.ops.layers import ComposedLayers, LayerShape
from pagetide.ops.plain import TORCH_LAYERS


def check_layers(
    shape: LayerShape, lengths, dtype, window, has_norms, has_bias, has_fp8=False, make_chunks=TiledChunks
) -> None:
    """Whole steps against torch's. In float16 and bfloat16 that computes the same in float32 from the same
    weights.
    """
    weights = random_layers(shape, dtype, window, has_norms, has_bias)
    if has_fp8:
        weights = [replace(layer, k_scale=2.0**-6, v_scale=2.0**-10) for layer in weights]
    kept = torch.float8_e4m3fn
    composed = ComposedLayers(TORCH_LAYERS, shape, weights)
    there = LayerShape(**{**vars(shape), "cos_sin": shape.cos_sin.to(DEVICE)})
    on_device = ComposedLayers(gpu_layers(dtype, Choices(), make_chunks), there, moved(weights, dtype))
    give_adapters(shape, composed, on_device)
    expected = run_steps(composed, shape, lengths, 0.0, kept if has_fp8 else torch.float32)
    found = run_steps(on_device, there, lengths, torch.nan, kept if has_fp8 else dtype, dtype)
    for own, right in zip(found, expected, strict=True):
        # What is nearly between two FP8 values may become either.
        most = {torch.float32: 1e-2 if has_fp8 else 2e-5}.get(dtype, 0.03)
        assert (own - right).norm() < most * right.norm()


def moved(value, dtype):
    """Weights as they lie on the device, all of one type."""
    if isinstance(value, torch.Tensor):
        return value.to(DEVICE, dtype)
    if isinstance(value, list):
        return [moved(part, dtype) for part in value]
    if hasattr(value, "__dataclass_fields__"):
        return type(value)(**{name: moved(part, dtype) for name, part in vars(value).items()})
    return value
