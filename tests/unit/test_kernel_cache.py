"""Where compiled kernels are kept: Numba knows neither their sources nor what Linux lends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from triton_server import ROOT

ASK = "from pagetide.ops.cpu import compiled; print(compiled.numba.config.CACHE_DIR, compiled.source_hash())"


def asked(**environment: str) -> tuple[Path, str]:
    """The folder, and the sources' hash, of a process with these variables."""
    known = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    told = subprocess.run(
        [sys.executable, "-c", ASK],
        cwd=ROOT / "backend_src",
        env={**known, **environment},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    return Path(told[0]), told[1]


def test_each_version_of_the_kernels_has_a_folder_of_its_own(tmp_path):
    folder, sources = asked()
    assert folder.name.startswith(f"kernels-{sources}") and folder.is_relative_to(ROOT / "backend_src")
    given, _ = asked(NUMBA_CACHE_DIR=str(tmp_path / "given"))
    assert given == tmp_path / "given" / folder.name and given.is_dir()
    assert asked(NUMBA_CACHE_DIR=str(tmp_path / "given"))[0] == given


def test_kernels_are_kept_for_the_user_where_the_first_place_cannot_be_written(tmp_path):
    no_folder = tmp_path / "file"
    no_folder.touch()
    folder, sources = asked(NUMBA_CACHE_DIR=str(no_folder), HOME=str(tmp_path))
    assert folder.is_relative_to(tmp_path / ".cache" / "pagetide")
    assert folder.name.startswith(f"kernels-{sources}") and folder.is_dir()


def test_registers_that_are_not_lent_are_not_used():
    """Kernels for them would be loaded and end the process."""
    refused = (
        "import ctypes, pathlib; real = ctypes.CDLL\n"
        "class Refusing(real):\n"
        "    def __getattr__(self, name):\n"
        "        return (lambda *a: -1) if name == 'syscall' else super().__getattr__(name)\n"
        "ctypes.CDLL = Refusing\n"
        "from pagetide.ops.cpu import compiled\n"
        "assert not compiled.HAS_MATRIX_TILES\n"
        "assert not compiled.numba.config.CACHE_DIR.endswith('-amx')\n"
    )
    subprocess.run([sys.executable, "-c", refused], cwd=ROOT / "backend_src", check=True)
