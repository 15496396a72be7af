"""What clients and the engine process say to each other: MessagePack over a local socket, one message per batch or step."""

from __future__ import annotations

import msgspec

from pagetide.types import EngineInfo, Output, Request

ERROR_PREFIX = "pagetide-error: "  # how a parent finds the reason of a failed start in the engine's standard output


class Hello(msgspec.Struct, tag=True, frozen=True):
    """A client is there, and wants to know the engine; and, if it says so, its statistics from time to time."""

    wants_statistics: bool = False


class Submit(msgspec.Struct, tag=True, frozen=True):
    requests: list[Request]


class Cancel(msgspec.Struct, tag=True, frozen=True):
    """Ends requests by their numbers, and all that their clients call request_id if it is not empty."""

    numbers: list[int] = []
    request_id: str = ""


class Ready(msgspec.Struct, tag=True, frozen=True):
    """The engine's answer to Hello."""

    info: EngineInfo


class Outputs(msgspec.Struct, tag=True, frozen=True):
    """All that one step has for one client."""

    outputs: list[Output]


class Statistics(msgspec.Struct, tag=True, frozen=True):
    """What the engine holds now (sequences, KV blocks), what it has counted since its start, and what it has observed since the last report."""

    gauges: dict[str, int]
    counters: dict[str, int]
    observations: dict[str, list[float]]


class Refused(msgspec.Struct, tag=True, frozen=True):
    """A request that the engine does not take now, or, if is_invalid, never."""

    number: int
    reason: str
    is_invalid: bool = False


ToEngine = Hello | Submit | Cancel
FromEngine = Ready | Outputs | Statistics | Refused
