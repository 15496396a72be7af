"""What the machine allows: its memory, its matrix products; and what it is."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from engines import CACHE


def machine_limits(model: str) -> dict[str, float]:
    """What memory and matrix products allow, as medians of two seconds, since steps are measured as medians
    too and a shared machine's memory changes its speed from second to second.

    read_gb_s, and best_read_gb_s; bfloat16_gflop_s, float32_gflop_s; and what the model asks for: weights of
    layers and head, and the MB of both; kv_bytes of a token; attention_flop of a query and a key.
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

    def seconds_of(function: Callable[[], Any], seconds: float = 2.0) -> list[float]:
        function()
        times, end = [], time.perf_counter() + seconds
        while time.perf_counter() < end:
            begin = time.perf_counter()
            function()
            times.append(time.perf_counter() - begin)
        return times

    array = np.ones(2**27, np.float32)
    times = seconds_of(lambda: read(array))
    limits = {
        "read_gb_s": array.nbytes / statistics.median(times) / 1e9,
        "best_read_gb_s": array.nbytes / min(times) / 1e9,
    }
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        a, b = torch.randn(512, 1024).to(dtype), torch.randn(4096, 1024).to(dtype)
        times = seconds_of(partial(torch.nn.functional.linear, a, b))
        limits[f"{name}_gflop_s"] = 2 * 512 * 1024 * 4096 / statistics.median(times) / 1e9
    _, config = read_model(find_model(model, Path(CACHE)))
    heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim * config.hidden_size
    layer = heads + 3 * config.hidden_size * config.intermediate_size
    limits["layer_weights"] = config.num_layers * layer
    limits["head_weights"] = config.vocab_size * config.hidden_size
    limits["kv_bytes"] = 4 * config.num_layers * config.num_kv_heads * config.head_dim  # of a token, bfloat16
    limits["attention_flop"] = 4 * config.num_layers * config.num_heads * config.head_dim  # query and key
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
