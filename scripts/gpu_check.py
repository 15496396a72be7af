"""Checks and measures the GPU engine: each part by itself, so that a failed one hides no other, with what is
known so far written after each.

scripts/gpu_check.sh [--quick] [--only PART ...] [--out FILE] [--dry-run]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
Rows = list[dict[str, Any]]
FAILURES: list[str] = []  # test files with a failed test
DEFAULT_PARTS = [
    "tests",
    "limits",
    "decode-attention",
    "prefill-attention",
    "products",
    "sampling",
    "steps",
    "prefill",
    "serving",
    "quantized",
    "transformers",
]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the small models and few sizes")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help="of the parts in --list")
    parser.add_argument("--list", action="store_true", help="names the parts")
    parser.add_argument("--out", default="gpu_check.json", help="where the figures go")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="without a GPU: tiny sizes in the Triton language's interpreter",
    )
    return parser.parse_args()


def run_tests() -> Rows:
    """The kernels against their references, the engine against transformers."""
    files = [
        "tests/gpu",
        "tests/engine/test_gpu_ops.py",
        "tests/engine/test_gpu_products.py",
        "tests/engine/test_gpu_engine.py",
    ]
    # By themselves, since what breaks a device ends its process; all at the same time.
    running = {}
    for file in files:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=short", "-p", "no:cacheprovider", file]
        running[file] = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    rows = []
    for file, process in running.items():
        said = process.communicate()[0].strip().splitlines() or ["nothing"]
        if process.returncode:
            FAILURES.append(file)
            print("\n".join(line for line in said if "Assertion `" not in line)[-4000:], flush=True)
        rows.append({"tests": file, "result": said[-1]})
    return rows


def parts(options: argparse.Namespace) -> dict[str, Callable[[], Rows]]:
    """What is run, by name, in this order."""
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are imported
    import gpu_engine
    import gpu_kernels
    import gpu_products
    import gpu_scale
    import torch

    if options.dry_run:
        scale = gpu_scale.Scale(torch.device("cpu"), torch.float32, ["tiny"], 1)
    else:
        models = (
            ["Qwen3-0.6B", "Llama-3.2-1B"]
            if options.quick
            else ["Qwen3-0.6B", "Llama-3.2-1B", "Llama-3.1-8B"]
        )
        scale = gpu_scale.Scale(torch.device("cuda"), torch.bfloat16, models, 10)

    def after_limits(function: Callable[[], Rows]) -> Callable[[], Rows]:
        def run() -> Rows:
            if not scale.limits:
                gpu_scale.measure_limits(scale)
            return function()

        return run

    def beside_transformers() -> Rows:
        from gpu_transformers import measure_transformers  # what it imports may fail, and no other part then

        return measure_transformers(scale)

    measured: dict[str, Callable[[], Rows]] = {
        "limits": partial(gpu_scale.measure_limits, scale),
        "decode-attention": after_limits(partial(gpu_kernels.measure_decode_attention, scale)),
        "prefill-attention": after_limits(partial(gpu_kernels.measure_prefill_attention, scale)),
        "products": after_limits(partial(gpu_products.measure_products, scale)),
        "sampling": after_limits(partial(gpu_kernels.measure_sampling, scale)),
        "steps": after_limits(partial(gpu_engine.measure_steps, scale)),
        "prefill": after_limits(partial(gpu_engine.measure_prefill, scale)),
        "serving": after_limits(partial(gpu_engine.measure_serving, scale, options.quick)),
        "quantized": after_limits(partial(gpu_engine.measure_quantized, scale)),
        "transformers": beside_transformers,
        "decode-attention-fp8": after_limits(
            partial(gpu_kernels.measure_decode_attention, scale, torch.float8_e4m3fn)
        ),
        "quantized-serving": after_limits(
            partial(gpu_engine.measure_quantized_serving, scale, options.quick)
        ),
        "tune": after_limits(partial(gpu_kernels.tune, scale)),
        "profile": after_limits(partial(gpu_engine.profile_steps, scale)),
    }
    return measured if options.dry_run else {"tests": run_tests, **measured}


def table(rows: Rows) -> str:
    """Rows of the same columns as markdown."""
    if not rows:
        return "(nothing)"
    names = list(dict.fromkeys(name for row in rows for name in row))

    def cell(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    lines += ["| " + " | ".join(cell(row.get(name, "")) for name in names) + " |" for row in rows]
    return "\n".join(lines)


def machine() -> dict[str, str]:
    import torch
    import triton

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "a CPU"
    return {
        "device": name,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }


def main() -> int:
    options = parse()
    chosen = parts(options)
    if options.list:
        print("\n".join(chosen))
        return 0
    unknown = sorted(set(options.only) - set(chosen))
    if unknown:
        print(f"there is no part called {', '.join(unknown)}; there are {', '.join(chosen)}", file=sys.stderr)
        return 2
    report: dict[str, Any] = {
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
        "parts": {},
        "failed": {},
    }
    print(report["machine"], flush=True)
    for name, part in chosen.items():
        if name not in (options.only or DEFAULT_PARTS):
            continue
        begin = time.monotonic()
        try:
            report["parts"][name] = rows = part()
            print(f"\n## {name} ({time.monotonic() - begin:.0f} s)\n{table(rows)}", flush=True)
        except Exception as error:
            report["failed"][name] = repr(error)
            print(
                f"\n## {name} failed after {time.monotonic() - begin:.0f} s\n{traceback.format_exc()}",
                flush=True,
            )
        Path(options.out).write_text(json.dumps(report, indent=1))
    return bool(report["failed"] or FAILURES)


if __name__ == "__main__":
    raise SystemExit(main())
