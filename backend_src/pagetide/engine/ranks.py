"""The processes of a model's other ranks: rank 0 is the engine's own, starts those of its machine and waits
for those of others.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import msgspec
import torch.distributed as dist
from torch.distributed import Store

from pagetide.config import Settings, SettingsError
from pagetide.engine.parent import environment_of_children
from pagetide.folders import ranks_folder
from pagetide.runner.device import Device
from pagetide.runner.ranks import TorchComm

log = logging.getLogger("pagetide.ranks")

_LOOK_S = 0.05
_LEAVE_S = 10  # in which a rank that has been told so ends
_TELL_S = 10  # between two words of ranks that are waited for
_STORE_S = 5
_LATER_S = 1
_STDERR = 2
SETTINGS = "settings"  # the store's key of rank 0's settings
FAILURE = "failure"  # and of why the first rank that failed did


def joined_key(rank: int) -> str:
    """The store's key of a rank that is there."""
    return f"joined/{rank}"


class RankError(RuntimeError):
    """A rank other than 0 could not start, or has ended; the message says which and why."""


class Ranks:
    """The other ranks, seen from rank 0. on_lost: as assemble's."""

    def __init__(self, settings: Settings, on_lost: Callable[[str], None] | None):
        self._settings, self._on_lost = settings, on_lost
        self._is_closing = False
        self._comm: TorchComm | None = None
        self._folder = ranks_folder(os.getpid())
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._store: Store | None = None

    def start(self) -> None:
        """Starts those of this machine. Raises SettingsError."""
        settings = self._settings
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(mode=0o700)
        address = settings.rendezvous or str(self._folder / "store")
        self._store = open_store(settings, address, rank=0)
        self._store.set(SETTINGS, msgspec.json.encode(settings).decode())
        for rank in range(1, settings.local_size):
            self._processes[rank] = start_rank(settings, rank, address)
        for rank, process in self._processes.items():
            threading.Thread(
                target=self._watch, args=(rank, process), name=f"pagetide-rank-{rank}", daemon=True
            ).start()

    def join(self, device: Device) -> TorchComm:
        """Waits until all are there. Raises RankError."""
        store, missing = self._store, set(range(1, self._settings.tensor_parallel_size))
        assert store is not None
        # A little before the engine's owner gives up, who knows nothing of ranks.
        patience = 0.8 * self._settings.engine_start_timeout_s
        begin = told = time.monotonic()
        while missing:
            missing = {rank for rank in missing if not store.check([joined_key(rank)])}
            if reason := self.failure():
                raise RankError(reason)
            names = ", ".join(map(str, sorted(missing)))
            if missing and time.monotonic() > begin + patience:
                raise RankError(
                    f"ranks that have not joined within {patience:.0f} s (0.8 of the setting "
                    f"engine_start_timeout_s): {names}"
                )
            if missing and time.monotonic() > told + _TELL_S:
                log.info("ranks that have not joined yet: %s", names)
                told = time.monotonic()
            time.sleep(_LOOK_S)
        self._comm = make_comm(self._settings, device, store, 0)
        store.set_timeout(timedelta(seconds=_STORE_S))  # now that it is only asked for failures
        return self._comm

    def failure(self) -> str:
        """Why a rank has ended, as far as it is known; empty if none has."""
        codes = {rank: code for rank, each in self._processes.items() if (code := each.poll()) is not None}
        # One that was killed could say nothing; what others say then only follows from that.
        killed = {rank: code for rank, code in codes.items() if code < 0}
        store = self._store
        with contextlib.suppress(RuntimeError):  # the store's file has been tidied away
            if not killed and store is not None and store.check([FAILURE]):
                return store.get(FAILURE).decode()
        for rank, code in (killed or codes).items():
            return f"rank {rank} has ended ({_ending(code)}); the log above says why, if it could"
        return ""

    def wait_for_failure(self) -> str:
        """As failure(), for who has seen that something is wrong: the end of a process may be known a moment
        later.
        """
        deadline = time.monotonic() + _LATER_S
        while not (reason := self.failure()) and time.monotonic() < deadline:
            time.sleep(_LOOK_S)
        return reason

    def _watch(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        process.wait()
        if not self._is_closing and self._on_lost is not None:
            self._on_lost(self.failure())

    def wait(self) -> None:
        """Returns when all processes of this machine have ended, which they have been told to, or are made
        to.
        """
        self._is_closing = True
        for process in self._processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_LEAVE_S)
        self.kill()

    def kill(self) -> None:
        """Leaves no process, no file and no group of processes behind."""
        self._is_closing = True
        for process in self._processes.values():
            process.kill()
            process.wait()
        if self._comm is not None:
            with contextlib.suppress(RuntimeError):  # a group whose ranks have ended
                self._comm.close()
        self._comm = self._store = None
        shutil.rmtree(self._folder, ignore_errors=True)


@contextlib.contextmanager
def start_ranks(settings: Settings, on_lost: Callable[[str], None] | None) -> Iterator[Ranks]:
    """Starts the ranks of this machine; if what follows fails, they end.

    Raises SettingsError, and RankError in place of an error that another rank's end explains.
    """
    ranks = Ranks(settings, on_lost)
    try:
        ranks.start()
        yield ranks
    except BaseException as error:
        reason = ranks.wait_for_failure() if isinstance(error, RuntimeError) else ""
        ranks.kill()
        if reason and not isinstance(error, RankError):
            raise RankError(reason) from error
        raise


def check_nodes(settings: Settings) -> None:
    """Raises SettingsError if the ranks cannot be placed on machines as the settings say."""
    size, local_size = settings.tensor_parallel_size, settings.local_size
    if size % local_size:
        raise SettingsError(
            f"ranks_per_node is {local_size}, but tensor_parallel_size is {size}: it must be a multiple"
        )
    if local_size < size and not settings.rendezvous:
        raise SettingsError(
            f"ranks_per_node is {local_size} of {size} ranks: rendezvous must say where they meet, host:port"
        )


def open_store(settings: Settings, address: str, rank: int) -> Store:
    """Where all ranks meet: a file, or a port of rank 0's machine. Raises SettingsError."""
    if not settings.rendezvous:
        return dist.FileStore(address, settings.tensor_parallel_size)
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise SettingsError(f"rendezvous is {address!r}; it must be host:port")
    timeout = timedelta(seconds=settings.engine_start_timeout_s)
    try:
        return dist.TCPStore(host, int(port), is_master=rank == 0, wait_for_workers=False, timeout=timeout)
    except dist.DistNetworkError as error:
        raise SettingsError(f"ranks cannot meet at {address} (the setting rendezvous): {error}") from error


def make_comm(settings: Settings, device: Device, store: Store, rank: int) -> TorchComm:
    """Joins the others."""
    size, is_local = settings.tensor_parallel_size, not settings.rendezvous
    return TorchComm(device, store, rank, size, is_local, settings.engine_start_timeout_s)


def start_rank(settings: Settings, rank: int, address: str) -> subprocess.Popen[bytes]:
    """A rank's process, which ends when this one does."""
    body = msgspec.json.encode(settings).decode()
    command = [sys.executable, "-m", "pagetide.engine.rank", str(os.getpid()), body, str(rank), address]
    environment = environment_of_children()
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=_STDERR, env=environment)


def _ending(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
