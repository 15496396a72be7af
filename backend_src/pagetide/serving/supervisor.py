"""Starts the engine's process, and starts it again; says why where it cannot be started."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import msgspec

from pagetide.config import Settings
from pagetide.engine.messages import BEAT_PREFIX, ERROR_PREFIX
from pagetide.engine.parent import environment_of_children
from pagetide.folders import ranks_folder, write_whole
from pagetide.serving.client import EngineClient, EngineStartError
from pagetide.serving.left_behind import remove_left_behind
from pagetide.serving.pulse import Pulse

_KILLED_S = 10  # in which a killed process is gone
_UNLOADED_S = 60  # in which a model that is being unloaded has answered its last requests
_LOOK_S = 0.1
_STALE_S = 5  # in which the owner of a new engine has removed what is said of the last one


def has_owner(path: Path) -> bool:
    """Whether some model starts the engine at this socket, and starts it again when it has ended."""
    return path.with_suffix(".lock").exists()


def failure_file(path: Path) -> Path:
    """Where the owner of the engine at this socket tells its other clients why it could not start."""
    return path.with_suffix(".failed")


class EngineSupervisor:
    """Owns the engine process: starts it, ends it when it is stuck, and starts it again whenever it ends.

    owner: the model's instance. Raises EngineStartError if another one of the same server has an engine
    already: two cannot listen on one socket. The same one that is being unloaded is waited for.
    """

    command = (sys.executable, "-m", "pagetide.engine")  # scripts/way_out.py has another

    def __init__(self, settings: Settings, path: Path, owner: str, log: Callable[[str], None]):
        self._settings = settings
        self._path = path
        self._log = log
        self._stopping = threading.Event()
        self._has_started = threading.Event()
        self.num_restarts = 0
        self._lock = _exclusive_lock(path.with_suffix(".lock"), owner)
        failure_file(path).unlink(missing_ok=True)
        remove_left_behind()
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
        _kill(self._process)
        self._watcher.join()
        self._path.unlink(missing_ok=True)
        self._path.with_suffix(".lock").unlink(missing_ok=True)
        self._lock.close()

    def _spawn(self) -> subprocess.Popen[str]:
        self._pulse.start()
        settings = msgspec.json.encode(self._settings).decode()
        command = [*self.command, str(os.getpid()), settings, f"ipc://{self._path}"]
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            env=environment_of_children(),
            start_new_session=True,  # with its other ranks, so that all can be ended at once
        )

    def _watch(self) -> None:
        delay = 0.0
        while True:
            begin = time.monotonic()
            reason = self._wait_for_end()
            if self._stopping.is_set():
                return
            if not self._has_started.is_set():
                write_whole(failure_file(self._path), reason)
                return
            # An engine that lived is started at once; one that cannot start is tried less and less often.
            delay = 0.0 if time.monotonic() - begin > 60 else min(30.0, delay * 2 + 0.5)
            self._log(f"the engine ended ({reason}); starting it again in {delay:.1f} s")
            self.num_restarts += 1
            if self._stopping.wait(delay):
                return
            self._process = self._spawn()
            if self._stopping.is_set():
                _kill(self._process)

    def _feel_pulse(self) -> None:
        """Ends an engine that is stuck; what follows is as for one that has ended by itself."""
        while not self._stopping.wait(1):
            process = self._process  # which may be another one a moment later
            if reason := self._pulse.tick():
                self._end_reason = reason
                self._log(f"the engine is ended: {reason}")
                _kill(process)
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
        # Its other ranks, of which one may be too stuck to see that this one has ended; before that is
        # reaped, when its number may be another's. (Who ends it for being stuck has ended them too.)
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        _kill(self._process)
        code = self._process.wait()
        shutil.rmtree(ranks_folder(self._process.pid), ignore_errors=True)
        said = self._end_reason or said
        return said or (f"signal {-code}" if code < 0 else f"exit code {code}")


def _kill(engine: subprocess.Popen[str]) -> None:
    """Ends the engine, if it has not been waited for, and its other ranks."""
    if engine.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(engine.pid, signal.SIGKILL)


def _exclusive_lock(file: Path, owner: str) -> TextIO:
    """Holds the file, which says who does, until it is closed or this process ends."""
    deadline = time.monotonic() + _UNLOADED_S
    while True:
        opened = file.open("a+")
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if file.exists() and os.path.samestat(os.fstat(opened.fileno()), file.stat()):
                break  # and not one that its last owner has just removed
        except BlockingIOError:
            opened.seek(0)
            if opened.read() != owner or time.monotonic() > deadline:
                opened.close()
                raise EngineStartError(
                    "another model of this server runs its engine already: `llm` must have one instance, "
                    "and no copy; unload it before it is loaded again"
                ) from None
        opened.close()
        time.sleep(_LOOK_S)
    opened.truncate(0)
    opened.write(owner)
    opened.flush()
    return opened


def _text_of(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None


def wait_for_engine(client: EngineClient, path: Path, timeout_s: float, is_owner: bool) -> None:
    """Returns when the engine is ready; raises EngineStartError with the reason if it is not in time, or
    ended.
    """
    begin = time.monotonic()
    failed = failure_file(path)
    patience = 0.0 if is_owner else _STALE_S
    since: float | None = None
    while not client.wait_until_ready(0.1):
        now = time.monotonic()
        reason = _text_of(failed)
        since = (since or now) if reason is not None else None
        if since is not None and now - since >= patience:
            raise EngineStartError(f"the engine could not start: {reason}")
        if now - begin > timeout_s:
            raise EngineStartError(
                f"the engine was not ready within {timeout_s:.0f} s (the setting engine_start_timeout_s)"
            )
