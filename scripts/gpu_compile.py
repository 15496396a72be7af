"""Compiles every kernel in the Triton language as the engine launches it, for GPUs that need not be there:
registers, shared memory and spills of each.

python scripts/gpu_compile.py [--write] [--targets 80 90 100] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "backend_src"))

import numpy as np
import torch
import triton
from pagetide.ops.attention import HeadShape, LayerAttention
from pagetide.ops.batch import Batch, LogitEdits
from pagetide.ops.gpu import (
    activation,
    decode,
    dequantize,
    few_rows,
    gather,
    logits,
    norm,
    prefill,
    rotary,
    sampling,
)  # fmt: skip
from pagetide.ops.gpu.dequantize import streamed
from pagetide.ops.weights import DenseWeight, Fp8Weight, QuantizedWeight
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

REPORT = Path(__file__).with_name("gpu_kernels.md")
TARGETS = (80, 90, 100)
HEAD = """# The GPU's kernels, compiled

Registers of a thread, KiB of shared memory and spilled bytes of a thread, in bfloat16 with the Triton
language {version}. Written by `python scripts/gpu_compile.py --write`.

"""
_TYPES = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int64: "*i64",
    torch.int32: "*i32", torch.bool: "*i1", torch.int8: "*i8", torch.uint8: "*u8",
    torch.float8_e4m3fn: "*fp8e4nv",
}  # fmt: skip
SHAPES = {
    "8B": HeadShape(32, 8, 128),
    "1B": HeadShape(32, 8, 64),
    "0.6B": HeadShape(16, 8, 128),
    "head 256": HeadShape(8, 1, 256),
    "Gemma 2": HeadShape(8, 4, 256, soft_cap=50.0),
}


class Usage(NamedTuple):
    """What one kernel takes on one kind of GPU: registers of a thread, bytes of shared memory, and spilled
    bytes of a thread; whether it uses Hopper's matrix units.
    """

    kernel: str
    target: int
    registers: int
    shared: int
    spilled: int
    uses_wgmma: bool


class Compiler:
    """Stands in the place of launches."""

    def __init__(self, targets: tuple[int, ...]):
        self._targets = targets
        self.label = ""
        self.found: list[Usage] = []

    def launch(self, kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        values = dict(zip(kernel.arg_names, args, strict=False)) | {
            name: value for name, value in options.items() if name in kernel.arg_names
        }
        signature, constants, attributes = {}, {}, {}
        for at, (name, value) in enumerate(values.items()):
            parameter = kernel.params[at]
            is_one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
            kind = _type_of(value, parameter.is_constexpr or is_one)
            signature[name] = kind
            if kind == "constexpr":
                constants[(at,)] = value
            elif (kind.startswith("*") and not parameter.do_not_specialize_on_alignment) or (
                isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize
            ):
                attributes[(at,)] = [["tt.divisibility", 16]]
        source = ASTSource(kernel, signature, constants, attributes)
        compile_options = {name: options[name] for name in ("num_warps", "num_stages") if name in options}
        has_fp8 = "*fp8e4nv" in signature.values()
        for target in self._targets:
            if has_fp8 and target < 89:
                continue
            compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=compile_options)
            registers, spilled = _resources(compiled.asm["cubin"])
            name = f"{kernel.__name__} {self.label}".strip()
            uses_wgmma = "wgmma.mma_async" in compiled.asm["ptx"]
            self.found.append(Usage(name, target, registers, compiled.metadata.shared, spilled, uses_wgmma))


def _type_of(value: Any, is_constexpr: bool) -> str:
    if is_constexpr or value is None:
        return "constexpr"
    if isinstance(value, torch.Tensor):
        return _TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, spilled bytes) of a thread."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", said).groups()
    local = re.search(r"LOCAL:(\d+)", said)
    return int(registers), int(stack) + int(local.group(1) if local else 0)


def cases(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """A launch of every kernel, with the sizes of known models."""
    found: dict[str, Callable[[], object]] = {}

    def empty(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=kind)

    def ints(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32)

    longs = torch.zeros(8, dtype=torch.int64)
    floats = torch.zeros(8)
    for size in (1024, 4096):
        found[f"norm {size}"] = lambda size=size: norm.add_rms_norm(
            empty(8, size), empty(8, size), empty(size), 1e-5
        )
    for kind in ("silu", "gelu"):
        found[kind] = lambda kind=kind: activation.gated(empty(8, 2 * 14_336), kind)
    for name, shape in SHAPES.items():
        heads = shape.num_heads + 2 * shape.num_kv_heads
        kv, table = empty(64, 2, shape.num_kv_heads, 16, shape.head_dim), ints(8, 64)
        queries, out = (
            empty(8, heads, shape.head_dim)[:, : shape.num_heads],
            empty(8, shape.num_heads * shape.head_dim),
        )
        table_of_angles = empty(64, shape.head_dim, kind=torch.float32)
        layer = LayerAttention(table_of_angles, 0, out[0], out[0], 1e-5)
        longer = replace(layer, window=4096)
        batch = Batch(longs, longs, longs, table, ints(8), ints(8), np.ones(8), np.ones(8), 16)
        found[f"{name} rotary"] = lambda s=shape, kv=kv, layer=layer, batch=batch, heads=heads: (
            rotary.rotate_and_write(s, empty(8, heads * s.head_dim), kv, layer, batch)
        )
        as_fp8 = kv.to(torch.float8_e4m3fn)
        found[f"{name} rotary fp8"] = lambda s=shape, kv=as_fp8, layer=layer, batch=batch, heads=heads: (
            rotary.rotate_and_write(s, empty(8, heads * s.head_dim), kv, layer, batch)
        )
        for of, its_kv, its_layer in (
            (name, kv, layer),
            (f"{name} window", kv, longer),
            (f"{name} fp8", as_fp8, layer),
        ):
            found[of] = lambda s=shape, kv=its_kv, q=queries, t=table, layer=its_layer, out=out: (
                decode.attend_singles(
                    s, q, kv, t, ints(8), layer, decode.plan_singles(s, ints(8), ints(8), 64, 16), out
                ),
                prefill.attend_chunks(s, q, kv, t, layer, ints(8, 4), out),
            )
    x, whole = empty(64, 4096), empty(4096, 4096)
    forms = {"dense": DenseWeight(whole), "w8": _codes(8), "w4": _codes(4), "w4 in 128s": _codes(4, 128)}
    forms |= {"fp8": _fp8(4096), "fp8 in 128s": _fp8(128)}
    for name, weight in forms.items():
        there = streamed(weight)
        for rows in (16, 64):
            found[f"{name} of {rows}"] = lambda there=there, rows=rows: few_rows.multiply_few_rows(
                x[:rows], there, None, ints(4096)
            )
        if name != "dense":
            found[name] = lambda there=there: dequantize.dequantize(there, dtype)
    found["rows"] = lambda: dequantize.rows_to_fp8(x)
    wide = empty(8, 151_936, kind=torch.float32)
    found["gather"] = lambda: gather.gather(
        empty(257, 8193, kind=torch.int64), ints(257, 512), ints(257), ints(8), ints(8), 8, 16
    )
    found["blocks"] = lambda: gather.set_blocks(ints(257, 512), ints(8), ints(8), ints(8))
    found["argmax"] = lambda: sampling.argmax(wide)
    found["sample"] = lambda: sampling.sample(wide, floats, longs, floats, floats, longs, ints(8))
    found["penalize"] = lambda: logits.Penalties()(
        wide, empty(257, 8193, kind=torch.int64), ints(8), ints(8), longs, floats, floats, floats
    )
    edits = LogitEdits(ints(258), ints(8), floats, ints(8), ints(9), ints(8))
    found["edit"] = lambda: logits.edit(
        wide, empty(257, 8193, kind=torch.int64), ints(8), ints(8), longs, edits
    )
    found["mask"] = lambda: logits.mask(wide, ints(257, 4748), torch.zeros(257, dtype=torch.bool), ints(8))
    return found


def _codes(bits: int, group: int = 32) -> QuantizedWeight:
    """A matrix of 4096 outputs and inputs."""
    codes = torch.zeros(4096, 4096, dtype=torch.uint8)
    scales, minima = (torch.zeros(4096, 4096 // group) for _ in range(2))
    return QuantizedWeight(codes, scales, minima, bits, torch.bfloat16)


def _fp8(group: int) -> Fp8Weight:
    values = torch.zeros(4096, 4096, dtype=torch.float8_e4m3fn)
    return Fp8Weight(values, torch.zeros(4096, 4096 // group), torch.bfloat16)


def compile_all(dtype: torch.dtype = torch.bfloat16, targets: tuple[int, ...] = TARGETS) -> list[Usage]:
    compiler = Compiler(targets)
    with patch.object(
        JITFunction, "run", lambda kernel, *args, **options: compiler.launch(kernel, *args, **options)
    ):
        for label, launch in cases(dtype).items():
            compiler.label = label
            launch()
    return compiler.found


def table(found: list[Usage]) -> str:
    """One row for each kernel: registers, shared KiB and spilled bytes on each kind of GPU."""
    targets = list(dict.fromkeys(usage.target for usage in found))
    by_kernel: dict[str, dict[int, Usage]] = {}
    for usage in found:
        by_kernel.setdefault(usage.kernel, {})[usage.target] = usage
    lines = [
        "| kernel | " + " | ".join(f"sm_{target}" for target in targets) + " |",
        "|" + " --- |" * (len(targets) + 1),
    ]
    for kernel, usages in by_kernel.items():
        cells = [
            f"{u.registers}, {u.shared / 1024:.0f}, {u.spilled}" if (u := usages.get(target)) else "-"
            for target in targets
        ]
        lines.append(f"| {kernel} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="the report, into scripts/gpu_kernels.md")
    parser.add_argument("--targets", nargs="+", type=int, default=TARGETS, help="compute capabilities")
    parser.add_argument("--json", metavar="FILE", help="all figures")
    options = parser.parse_args()
    found = compile_all(targets=tuple(options.targets))
    text = HEAD.format(version=triton.__version__) + table(found) + "\n"
    print(text)
    if options.write:
        REPORT.write_text(text, encoding="utf-8")
    if options.json:
        Path(options.json).write_text(json.dumps([usage._asdict() for usage in found]), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
