"""Stubs of one server know when another has died, and what is left behind is removed; on real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pagetide import folders
from pagetide.engine.parent import environment_of_children
from pagetide.serving import left_behind
from pagetide.serving.client import drain
from pagetide.serving.left_behind import remove_left_behind, start_time

STUB = """
import sys, time
from pagetide.serving.siblings import Siblings
siblings = Siblings(sys.argv[1], int(sys.argv[2]))
siblings.join()
print("joined", flush=True)
if sys.argv[3] == "leaves":
    siblings.leave()
    print("left", flush=True)
time.sleep(600)
"""
SERVER = """
import os, subprocess, sys
code, *stubs = sys.argv[1:]
pipe = subprocess.PIPE
children = [
    subprocess.Popen([sys.executable, "-c", code, name, str(os.getpid()), how], stdout=pipe, text=True)
    for name, how in (stub.split(":") for stub in stubs)
]
for child, stub in zip(children, stubs):
    child.stdout.readline()
    if stub.endswith("leaves"):
        child.stdout.readline()
print(*(child.pid for child in children), flush=True)
children[0].wait()
import time
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)


def start(*stubs: str) -> tuple[subprocess.Popen[str], list[int]]:
    """A process with such children, each `name:stays` or `name:leaves`, and their numbers."""
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, STUB, *stubs],
        stdout=subprocess.PIPE,
        text=True,
        env=environment_of_children(),
    )
    assert server.stdout is not None
    return server, [int(pid) for pid in server.stdout.readline().split()]


def test_a_stub_that_dies_takes_the_server_and_all_stubs_with_it():
    server, stubs = start("a:stays", "b:stays")
    os.kill(stubs[0], signal.SIGKILL)
    assert server.wait(60) == -signal.SIGKILL
    wait_until_gone(stubs)
    assert list(folders.private_folder().iterdir()) == []


def test_a_stub_that_leaves_in_order_takes_nobody_with_it():
    server, stubs = start("a:leaves", "b:stays")
    os.kill(stubs[0], signal.SIGKILL)
    with pytest.raises(subprocess.TimeoutExpired):
        server.wait(4)
    server.kill()
    server.wait()
    wait_until_gone(stubs[1:])
    assert list(folders.private_folder().iterdir()) == []


def test_a_server_that_is_killed_leaves_no_file():
    server, stubs = start("a:stays", "b:stays")
    server.kill()
    server.wait()
    wait_until_gone(stubs)
    assert list(folders.private_folder().iterdir()) == []


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 60
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def ended_pid() -> int:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


def test_what_the_dead_have_left_is_removed_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(left_behind, "_SHARED_MEMORY", tmp_path)
    region = tmp_path / "triton_python_backend_shm_region_x"
    region.touch()
    folder, dead, own = folders.private_folder(), ended_pid(), os.getpid()
    (folder / f"stub-{dead}.1-llm").write_text(region.name)
    (folder / f"stub-{own}.1-llm").write_text("")  # of an earlier process with this number
    for name in (f"engine-{dead}.lock", f"engine-{dead}.sock", f"engine-{dead}.failed"):
        (folder / name).touch()
    kept = [f"stub-{own}.{start_time(own)}-llm", f"engine-{own}.lock", f"engine-{own}.sock", "notes"]
    kept += [f"engine-{dead}9.failed", f"ranks-{dead}"]  # too new
    for name in kept:
        (folder / name).touch()
    remove_left_behind()
    assert sorted(entry.name for entry in folder.iterdir()) == sorted(kept)
    assert not region.exists()


def test_only_the_engines_of_the_server_are_told_to_stop(monkeypatch):
    """And not those of one whose number begins alike."""
    folder, asked = folders.private_folder(), []
    for name in ("engine-82.sock", "engine-82-small.sock", "engine-823.sock", "engine-823-small.sock"):
        (folder / name).touch()
    monkeypatch.setattr("pagetide.serving.client._is_listening", lambda path: asked.append(path.name))
    assert drain(82, 1.0) == 0
    assert sorted(asked) == ["engine-82-small.sock", "engine-82.sock"]
