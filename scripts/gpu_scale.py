"""How scripts/gpu_check.py measures: on which device, how often, and against which limits."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

Rows = list[dict[str, Any]]


@dataclass
class Scale:
    """What is measured on a device, and how often."""

    device: torch.device
    dtype: torch.dtype
    models: list[str]
    repeats: int
    limits: dict[str, float] = field(default_factory=dict)

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    def seconds(self, function: Callable[[], Any], repeats: int = 0) -> float:
        """Seconds of one call on the device, as the median."""
        for _ in range(2):
            function()
        times = []
        for _ in range(repeats or self.repeats):
            if self.is_gpu:
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record()
                function()
                end.record()
                end.synchronize()
                times.append(begin.elapsed_time(end) / 1e3)
            else:
                start = time.perf_counter()
                function()
                times.append(time.perf_counter() - start)
        return statistics.median(times)

    def looped(self, functions: list[Callable[[], Any]]) -> float:
        """Seconds of one of the functions, all called one after the other from a graph: without launches'
        time, and with data that no cache holds if each has its own.
        """
        if not self.is_gpu:
            return self.seconds(functions[0], 1)
        for function in functions:
            function()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for function in functions:
                function()
        return self.seconds(graph.replay) / len(functions)


def measure_limits(scale: Scale) -> Rows:
    """What the machine can do at most."""
    size = 2**30 if scale.is_gpu else 2**16
    source, target = (torch.empty(size, dtype=torch.int32, device=scale.device) for _ in range(2))
    copy = 2 * source.nbytes / scale.seconds(partial(target.copy_, source))
    read = source.nbytes / scale.seconds(lambda: source.sum(dtype=torch.int32))
    n = 8192 if scale.is_gpu else 64
    a, b = (torch.randn(n, n, device=scale.device).to(scale.dtype) for _ in range(2))
    flops = 2 * n**3 / scale.seconds(lambda: a @ b)
    scale.limits |= {"bytes_s": max(copy, read), "flops": flops}
    return [{"copy TB/s": copy / 1e12, "read TB/s": read / 1e12, "matmul TFLOP/s": flops / 1e12}]


def share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %"
