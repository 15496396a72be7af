"""Starts the engine's process, and starts it again; says why where it cannot be started."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import msgspec

import pagetide
from pagetide.config import Settings
from pagetide.engine.messages import BEAT_PREFIX, ERROR_PREFIX
from pagetide.serving.client import EngineClient, EngineStartError
from pagetide.serving.pulse import Pulse

_KILLED_S = 10  # in which a killed process is gone


def failure_file(path: Path) -> Path:
    """Where the owner of the engine at this socket tells its other clients why it could not start."""
    return path.with_suffix(".failed")


class EngineSupervisor:
    """Owns the engine process: starts it, ends it when it is stuck, and starts it again whenever it ends.

    Raises EngineStartError if another one of the same server does so already: two engines cannot listen on
    one socket.
    """

    def __init__(self, settings: Settings, path: Path, log: Callable[[str], None]):
        self._settings = settings
        self._path = path
        self._log = log
        self._stopping = threading.Event()
        self._has_started = threading.Event()
        self.num_restarts = 0
        self._lock = _exclusive_lock(path.with_suffix(".lock"))
        failure_file(path).unlink(missing_ok=True)
        self._pulse = Pulse(settings.step_timeout_s, settings.engine_start_timeout_s + 5)
        self._end_reason = ""
        self._process = self._spawn()
        self._watcher = threading.Thread(target=self._watch, name="pagetide-supervisor", daemon=True)
        self._watcher.start()
        threading.Thread(target=self._feel_pulse, name="pagetide-pulse", daemon=True).start()

    def mark_started(self) -> None:
        """The first start has succeeded: from now on an engine that ends is started again."""
        self._has_started.set()

    def stop(self) -> None:
        """Ends the engine and removes its socket."""
        self._stopping.set()
        self._process.kill()
        self._watcher.join()
        self._path.unlink(missing_ok=True)
        self._path.with_suffix(".lock").unlink(missing_ok=True)
        self._lock.close()

    def _spawn(self) -> subprocess.Popen[str]:
        source = str(Path(pagetide.__file__).parents[1])
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH")))),
        }
        self._pulse.start()
        settings = msgspec.json.encode(self._settings).decode()
        command = [sys.executable, "-m", "pagetide.engine", str(os.getpid()), settings, f"ipc://{self._path}"]
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            env=environment,
        )

    def _watch(self) -> None:
        delay = 0.0
        while True:
            begin = time.monotonic()
            reason = self._wait_for_end()
            if self._stopping.is_set():
                return
            if not self._has_started.is_set():
                failure_file(self._path).write_text(reason, encoding="utf-8")
                return
            # An engine that lived is started at once; one that cannot start is tried less and less often.
            delay = 0.0 if time.monotonic() - begin > 60 else min(30.0, delay * 2 + 0.5)
            self._log(f"the engine ended ({reason}); starting it again in {delay:.1f} s")
            self.num_restarts += 1
            if self._stopping.wait(delay):
                return
            self._process = self._spawn()
            if self._stopping.is_set():
                self._process.kill()

    def _feel_pulse(self) -> None:
        """Ends an engine that is stuck; what follows is as for one that has ended by itself."""
        while not self._stopping.wait(1):
            process = self._process  # which may be another one a moment later
            if reason := self._pulse.tick():
                self._end_reason = reason
                self._log(f"the engine is ended: {reason}")
                process.kill()
                self._pulse.start()
                try:
                    process.wait(_KILLED_S)
                except subprocess.TimeoutExpired:
                    self._log("the engine does not end: a driver or a file system holds it")
                    process.wait()

    def _wait_for_end(self) -> str:
        """Waits until the process has ended; returns why, as far as it has said so."""
        said, self._end_reason = "", ""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(BEAT_PREFIX):
                number = line.removeprefix(BEAT_PREFIX).strip()
                if number.isdigit():  # and not mixed with what a library prints
                    self._pulse.beat(int(number))
            elif line.startswith(ERROR_PREFIX):
                said = line.removeprefix(ERROR_PREFIX).strip()
        code = self._process.wait()
        said = self._end_reason or said
        return said or (f"signal {-code}" if code < 0 else f"exit code {code}")


def _exclusive_lock(file: Path) -> TextIO:
    """Holds the file until it is closed, or this process ends."""
    opened = file.open("w")
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        opened.close()
        raise EngineStartError(
            "another model of this server runs its engine already: `llm` must have one instance, "
            "and no copy; unload it before it is loaded again"
        ) from None
    return opened


def wait_for_engine(client: EngineClient, path: Path, timeout_s: float) -> None:
    """Returns when the engine is ready; raises EngineStartError with the reason if it is not in time, or
    ended.
    """
    begin = time.monotonic()
    failed = failure_file(path)
    while not client.wait_until_ready(0.1):
        # A file that is older than this wait belongs to an earlier start.
        if failed.exists() and time.time() - failed.stat().st_mtime < time.monotonic() - begin + 1:
            raise EngineStartError(f"the engine could not start: {failed.read_text(encoding='utf-8')}")
        if time.monotonic() - begin > timeout_s:
            raise EngineStartError(
                f"the engine was not ready within {timeout_s:.0f} s (the setting engine_start_timeout_s)"
            )
