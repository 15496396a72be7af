"""What the machine allows: its memory, its matrix products; and what it is."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engines import CACHE


def machine_limits() -> dict[str, float]:
    """What memory and matrix products allow: read bandwidth in GB/s, products in GFLOP/s (bfloat16 and
    float32), weights of a step in MB.
    """
    import numba
    import numpy as np
    import torch
    from pagetide.models.families import read_model
    from pagetide.models.source import find_model

    @numba.njit(parallel=True, fastmath=True)
    def read(array: np.ndarray) -> float:
        total = 0.0
        for i in numba.prange(array.shape[0]):
            total += array[i]
        return total

    def best(function: Callable[[], Any], seconds: float = 1.5) -> float:
        function()
        times, end = [], time.perf_counter() + seconds
        while time.perf_counter() < end:
            begin = time.perf_counter()
            function()
            times.append(time.perf_counter() - begin)
        return min(times)

    array = np.ones(2**27, np.float32)
    limits = {"read_gb_s": array.nbytes / best(lambda: read(array)) / 1e9}
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        a, b = torch.randn(512, 1024).to(dtype), torch.randn(4096, 1024).to(dtype)
        limits[f"{name}_gflop_s"] = (
            2 * 512 * 1024 * 4096 / best(lambda a=a, b=b: torch.nn.functional.linear(a, b)) / 1e9
        )
    _, config = read_model(find_model("", Path(CACHE)))
    heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim * config.hidden_size
    layer = heads + 3 * config.hidden_size * config.intermediate_size
    limits["layer_weights"] = config.num_layers * layer
    limits["head_weights"] = config.vocab_size * config.hidden_size
    limits["weights_mb"] = 2 * (limits["layer_weights"] + limits["head_weights"]) / 1e6
    limits["max_single_tokens_s"] = limits["read_gb_s"] * 1e3 / limits["weights_mb"]
    return limits


def versions() -> dict[str, str]:
    import numba
    import torch
    import transformers

    cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    name = next(
        (line.split(":", 1)[1].strip() for line in cpu.splitlines() if line.startswith("model name")),
        platform.processor(),
    )
    has_bf16 = "avx512_bf16" in cpu
    return {
        "processor": name,
        "avx512_bf16": str(has_bf16),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "numba": numba.__version__,
        "transformers": transformers.__version__,
    }
