"""Matrix products of few rows on a GPU, every form of a matrix by every way, for scripts/gpu_check.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from gpu_scale import Rows, Scale, share
from pagetide.ops.gpu.choices import Choices
from pagetide.ops.gpu.matmul import GpuProduct
from pagetide.ops.weights import DenseWeight, Weight, quantize, quantize_fp8

FORMS: dict[str, Callable[[torch.Tensor], Weight]] = {
    "dense": DenseWeight,
    "w8": partial(quantize, bits=8),
    "w4": partial(quantize, bits=4),
    "fp8": quantize_fp8,
}


class _Each(Choices):
    """Remembers the ways of each number of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.ways: dict[int, dict[str, Callable[[torch.Tensor], torch.Tensor]]] = {}

    def fastest(self, key, ways, unmeasured, make_x):
        self.ways[int(key.split()[0])] = ways
        return ways[unmeasured]


def measure_products(scale: Scale) -> Rows:
    """Microseconds of each way, with other matrices before so that no cache holds this one; the best one's
    share of the time in which memory gives the matrix, or matrix products are done, whichever is longer.
    """
    sizes = {"8B qkv": (6144, 4096), "8B down": (4096, 14_336), "0.6B gate, up": (6144, 1024)}
    rows = []
    for name, (outputs, inputs) in (sizes if scale.is_gpu else {"tiny": (48, 64)}).items():
        copies = 4 if scale.is_gpu else 1
        for form, make in FORMS.items():
            each = _Each()
            values = [
                torch.randn(outputs, inputs, device=scale.device).to(scale.dtype) for _ in range(copies)
            ]
            products = [GpuProduct(each, make(one), None, scale.dtype) for one in values]
            taken = products[0].weight.values.nbytes
            for count in (16, 64, 256) if scale.is_gpu else (16,):
                x = torch.randn(count, inputs, device=scale.device).to(scale.dtype)
                times = {
                    way: scale.looped([partial(getattr(one, f"by_{way}"), x) for one in products])
                    for way in each.ways[count]
                }
                least = max(
                    taken / scale.limits["bytes_s"], 2 * count * outputs * inputs / scale.limits["flops"]
                )
                rows.append(
                    {
                        "matrix": name,
                        "form": form,
                        "rows": count,
                        **{f"{way}: us": seconds * 1e6 for way, seconds in times.items()},
                        "of the limit": share(least, min(times.values())),
                    }
                )
    return rows
