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
    """What the engine holds now, and what it has done since its start. Counts of requests, KV blocks and tokens."""

    running: int
    waiting: int
    blocks_total: int
    blocks_used: int
    blocks_cached: int
    prompt_tokens: int
    generated_tokens: int
    cached_tokens: int
    preemptions: int
    cancelled: int


class Refused(msgspec.Struct, tag=True, frozen=True):
    """A request that the engine does not take now."""

    number: int
    reason: str


ToEngine = Hello | Submit | Cancel
FromEngine = Ready | Outputs | Statistics | Refused
