"""Which matrix product a CPU uses: timed on the model's own shapes at load, kept on disk for this processor."""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import time
from bisect import bisect_right
from functools import partial
from pathlib import Path

import numba
import torch
import torch.nn.functional as F

from pagetide.ops.attention import HeadShape
from pagetide.ops.cpu.activation import silu_mul
from pagetide.ops.cpu.attention import NumbaAttention
from pagetide.ops.cpu.compiled import as_numpy
from pagetide.ops.cpu.logits import edit, mask, penalize
from pagetide.ops.cpu.matmul import matmul
from pagetide.ops.cpu.norm import add_rms_norm
from pagetide.ops.cpu.sampling import argmax, sample, score
from pagetide.ops.table import Matmul, Ops

# Numbers of rows at which the candidates are compared; between two of them the lower one's winner is used.
TIMED_ROWS = (1, 2, 4, 8, 16, 32, 64, 256)
_MIN_SECONDS = 0.006
_ROTATION_BYTES = 64 * 2**20


def make_cpu_ops(cache: Path) -> Ops:
    """Numba kernels and oneDNN; activations are float32, weights and KV bfloat16 or float32."""
    return Ops(
        add_rms_norm=add_rms_norm,
        silu_mul=silu_mul,
        argmax=argmax,
        sample=sample,
        penalize=penalize,
        edit=edit,
        mask=mask,
        score=score,
        make_matmul=partial(make_matmul, timings=MatmulTimings(cache / "matmul.json")),
        make_attention=make_attention,
    )


def make_attention(shape: HeadShape) -> NumbaAttention:
    return NumbaAttention(shape)


def candidates(weight: torch.Tensor) -> dict[str, Matmul]:
    """All ways to compute x @ weight.T for float32 x [m, in] and a float32 or bfloat16 weight [out, in]; the result is float32."""
    array = as_numpy(weight)

    def in_numba(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty((x.shape[0], weight.shape[0]), dtype=torch.float32)
        matmul(x.numpy(), array, out.numpy())
        return out

    def in_float32(x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, weight.float())

    def in_bfloat16(x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.bfloat16(), weight).float()

    if weight.dtype is torch.bfloat16:
        return {"numba": in_numba, "float32": in_float32, "bfloat16": in_bfloat16}
    return {"numba": in_numba, "float32": in_float32}


def make_matmul(weight: torch.Tensor, bias: torch.Tensor | None, timings: MatmulTimings) -> Matmul:
    """x -> x @ weight.T + bias that uses, for each number of rows, what was fastest."""
    weight = weight.contiguous()
    ways = candidates(weight)
    winners = [ways[name] for name in timings.winners(weight)]
    wide_bias = None if bias is None else bias.float()

    def choose(x: torch.Tensor) -> torch.Tensor:
        y = winners[bisect_right(TIMED_ROWS, x.shape[0]) - 1](x)
        return y if wide_bias is None else y.add_(wide_bias)

    return choose


class MatmulTimings:
    """The winners by weight shape and dtype, in a JSON file with one entry for each processor."""

    def __init__(self, file: Path):
        self._file = file
        self._machine = machine_key()
        self._winners: dict[str, list[str]] = self._read().get(self._machine, {})

    def winners(self, weight: torch.Tensor) -> list[str]:
        """The name of the fastest way for each of TIMED_ROWS."""
        key = f"{weight.shape[0]}x{weight.shape[1]} {weight.dtype}"
        if key not in self._winners:
            # Copies enough to leave the cache between two uses, as in a step where all other weights come between.
            count = max(2, min(64, _ROTATION_BYTES // weight.nbytes))
            copies = [candidates(weight.clone()) for _ in range(count)]
            self._winners[key] = [fastest(weight.shape[1], copies, rows) for rows in TIMED_ROWS]
            self._write()
        return self._winners[key]

    def _read(self) -> dict[str, dict[str, list[str]]]:
        try:
            return json.loads(self._file.read_bytes())
        except (FileNotFoundError, json.JSONDecodeError):
            return {}  # never timed here, or a write that was cut off: timed again

    def _write(self) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        partial_file = self._file.with_suffix(f".{os.getpid()}")
        partial_file.write_text(json.dumps({**self._read(), self._machine: self._winners}, indent=1))
        partial_file.replace(self._file)


def fastest(num_inputs: int, copies: list[dict[str, Matmul]], rows: int) -> str:
    """The name of the way that takes the shortest time; copies: the candidates for equal weights in different places."""
    x = torch.randn(rows, num_inputs)
    return min(copies[0], key=lambda name: seconds_of([ways[name] for ways in copies], x))


def seconds_of(ways: list[Matmul], x: torch.Tensor) -> float:
    """The median over runs that take turns among the ways, after one that warms up."""
    ways[0](x)
    times: list[float] = []
    while sum(times) < _MIN_SECONDS or len(times) < 3:
        begin = time.perf_counter()
        ways[len(times) % len(ways)](x)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def machine_key() -> str:
    """Names processor, number of threads and versions: what timings depend on."""
    parts = (cpu_model(), numba.get_num_threads(), torch.get_num_threads(), torch.__version__, numba.__version__, TIMED_ROWS)
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()


def cpu_model() -> str:
    """The processor's name and flags, as Linux tells them."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags"))}))
