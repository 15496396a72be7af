"""LoRA adapters as requests name them: read when they are asked for, each with a place beside the model as
long as sequences run with it.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from pagetide.runner.plan import AdapterLoad
from pagetide.types import RequestError

log = logging.getLogger("pagetide.adapters")

_NAMED = "there is no adapter {!r} (lora_name, lora_task_id)"
_MOST_NAMED = 20
_IN_MEMORY = 4  # times as many as have a place


@dataclass(frozen=True, eq=False)
class Adapter:
    """key: its name, and which version of its files this is; tensors: as models.adapters.read_adapter."""

    key: str
    tensors: dict[str, np.ndarray]


class AdapterSource(Protocol):
    """Where adapters come from."""

    def start(self, name: str) -> Future[Adapter] | None:
        """Begins to read one; the future raises RequestError where there is none. None: others take all the
        memory that there is for them; ask again when some of those are no longer used.
        """


class NoAdapters:
    """Of an engine that has none."""

    def start(self, name: str) -> Future[Adapter] | None:
        future: Future[Adapter] = Future()
        future.set_exception(
            RequestError(f"{_NAMED.format(name)}: this server has none (its setting lora_dir)")
        )
        return future


class AdapterFolder:
    """Adapters in a folder, one folder each, which may come and change at any time.

    version, read: of one of them; both may raise ValueError. count: how many have a place beside the model;
    some more may be in memory, waiting for one.
    """

    def __init__(
        self,
        folder: Path,
        version: Callable[[Path], str],
        read: Callable[[Path], dict[str, np.ndarray]],
        count: int,
    ):
        self._folder, self._version, self._read = folder, version, read
        self._count = count
        self._pool = ThreadPoolExecutor(1, "pagetide-adapters")
        self._reading: dict[str, Future[Adapter]] = {}
        self._in_memory: weakref.WeakValueDictionary[str, Adapter] = weakref.WeakValueDictionary()
        self._recent: OrderedDict[str, Adapter] = OrderedDict()
        self._lock = threading.Lock()  # of what is in memory: it must not grow while it is looked through

    def start(self, name: str) -> Future[Adapter] | None:
        if (reading := self._reading.get(name)) is not None:
            return reading
        with self._lock:
            keys = list(self._in_memory)
        is_in_memory = any(key.startswith(f"{name}/") for key in keys)
        if not is_in_memory and len(self._reading) + len(keys) >= _IN_MEMORY * self._count:
            return None
        future = self._reading[name] = self._pool.submit(self._find, name)
        future.add_done_callback(lambda _: self._reading.pop(name, None))
        return future

    def _find(self, name: str) -> Adapter:
        try:
            names = sorted(entry.name for entry in self._folder.iterdir())
        except OSError as error:
            raise RequestError(f"lora_dir cannot be read: {error.strerror}") from error
        if name not in names:
            names = [one for one in names if one.isprintable()]
            shown = ", ".join(names[:_MOST_NAMED]) + (", ..." if len(names) > _MOST_NAMED else "")
            raise RequestError(f"{_NAMED.format(name)}; there are: {shown or 'none'}")
        try:
            adapter = self._read_whole(name)
        except ValueError as error:
            raise RequestError(f"the adapter {name!r} cannot be used: {error}") from error
        with self._lock:
            self._in_memory[adapter.key] = adapter
        self._recent[adapter.key] = adapter
        self._recent.move_to_end(adapter.key)
        while len(self._recent) > self._count:
            self._recent.popitem(last=False)
        return adapter

    def _read_whole(self, name: str) -> Adapter:
        """Of one version of its files. Raises ValueError."""
        version = self._version(self._folder / name)
        if (known := self._in_memory.get(f"{name}/{version}")) is not None:
            return known
        tensors = self._read(self._folder / name)
        if self._version(self._folder / name) != version:
            raise ValueError("it is being written; try again")
        log.info("adapter %s has been read", name)
        return Adapter(f"{name}/{version}", tensors)


class AdapterPlaces:
    """Which adapter lies where beside the model; of those that no sequence runs with, the one that has been
    used least recently makes room for another.
    """

    def __init__(self, count: int):
        self._free = list(range(count))
        self._place_of: OrderedDict[str, int] = OrderedDict()  # by key, least recently used first
        self._load: AdapterLoad | None = None

    def take_load(self) -> AdapterLoad | None:
        """What has to be read into its place before the next step: one in each, since all wait meanwhile."""
        load, self._load = self._load, None
        return load

    def find(self, adapter: Adapter, used: Collection[int], claimed: Collection[int]) -> int | None:
        """Where it lies from the next step on; None if it has to wait. used: places that running sequences
        have; claimed: those that others wait for.
        """
        place = self._place_of.get(adapter.key)
        if place is None:
            key = None if self._free else self._oldest({*used, *claimed})
            if self._load is not None or not (self._free or key is not None):
                return None
            place = self._free.pop() if key is None else self._place_of.pop(key)
            self._place_of[adapter.key] = place
            self._load = AdapterLoad(place, adapter.tensors)
        elif place in claimed:
            return None
        self._place_of.move_to_end(adapter.key)
        return place

    def has_room(self, adapter: Adapter, used: Collection[int]) -> bool:
        """Whether it has a place, or there is one for it."""
        return bool(self._free) or adapter.key in self._place_of or self._oldest(used) is not None

    def next_free(self, claimed: Collection[int]) -> int | None:
        """The place to wait for where all are used, and others wait for some."""
        key = self._oldest(claimed)
        return None if key is None else self._place_of[key]

    def _oldest(self, taken: Collection[int]) -> str | None:
        """Whose place has been used least recently, of those that are not taken."""
        return next((key for key, place in self._place_of.items() if place not in taken), None)
