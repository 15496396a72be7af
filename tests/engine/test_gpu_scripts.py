"""scripts/gpu_check.sh with tiny sizes in the interpreter, and what every kernel takes once compiled."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from interpreted import HAS_GPU
from triton_server import ROOT


def run(*command: str) -> str:
    # The interpreter is asked for by its environment variable: here it is the scripts' own affair.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHON"] = sys.executable
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.skipif(HAS_GPU, reason="a machine with a GPU runs the real thing")
def test_gpu_check_measures_every_part(tmp_path):
    out = tmp_path / "report.json"
    said = run("scripts/gpu_check.sh", "--dry-run", "--out", str(out))
    report = json.loads(out.read_text())
    assert not report["failed"] and "## serving" in said
    parts = [
        "limits", "decode-attention", "prefill-attention", "products", "sampling", "steps", "prefill",
        "serving", "quantized", "transformers",
    ]  # fmt: skip
    assert list(report["parts"]) == parts and all(report["parts"].values())


def test_gpu_check_says_which_parts_there_are():
    environment = {**os.environ, "PYTHON": sys.executable}
    command = ["scripts/gpu_check.sh", "--dry-run", "--only", "nonsense"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and "there is no part called nonsense; there are limits" in done.stderr


def test_every_kernel_compiles_for_gpus_that_are_not_here(tmp_path):
    """Within their shared memory, and without spills where time goes; prefill on Hopper's matrix units."""
    out = tmp_path / "kernels.json"
    run(sys.executable, "scripts/gpu_compile.py", "--targets", "90", "--json", str(out))
    found = json.loads(out.read_text())
    assert len(found) > 20
    for usage in found:
        assert usage["shared"] <= 227 * 1024, usage
        assert not usage["spilled"] or "_prefill" in usage["kernel"], usage
        assert usage["uses_wgmma"] == usage["kernel"].startswith(("_prefill", "_few_rows")), usage
