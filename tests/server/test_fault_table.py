"""The faults of scripts/faults.py that no other test causes: each request ends, rightly or with one error,
and nothing is left over.
"""

from __future__ import annotations

import subprocess
import sys

import faults
import pytest
from triton_server import ROOT

NAMES = [
    "engine out of memory",
    "stub of llm killed",
    "server stopped and started",
    "full /dev/shm",
    "full disk, engine killed",
    "1000 clients vanish",
    "8 clients read a byte a second",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_fault_harms_only_what_it_must(name):
    (fault,) = (fault for fault in faults.FAULTS if fault.name == name)
    if fault.mounts:
        own = ["unshare", "--map-root-user", "--mount"]
        if subprocess.run([*own, "true"]).returncode:
            pytest.skip("this user may not mount anything")
        done = subprocess.run([*own, sys.executable, str(ROOT / "scripts" / "faults.py"), name])
        assert done.returncode == 0
    else:
        report = faults.run(fault, num_users=16)
        assert not report.failures
        assert report.num_answers > 16
