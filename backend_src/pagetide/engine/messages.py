"""What clients and the engine process say to each other: MessagePack over a local socket, one message per
batch or step.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from pagetide.engine.statistics import Statistics
from pagetide.types import EngineError, EngineInfo, Output, QueueFullError, Request, RequestError

ERROR_PREFIX = (
    "pagetide-error: "  # how a parent finds the reason of a failed start in the engine's standard output
)
BEAT_PREFIX = "pagetide-beat: "  # and, once a second, the number of the step that the engine is at


Fault = Literal["client", "queue", "engine"]


class Hello(msgspec.Struct, tag=True, frozen=True):
    """A client is there, and wants to know the engine; and, if it says so, its statistics from time to
    time.
    """

    wants_statistics: bool = False


class Submit(msgspec.Struct, tag=True, frozen=True):
    requests: list[Request]


class Cancel(msgspec.Struct, tag=True, frozen=True):
    """Ends requests by their numbers, and all that their clients call request_id if it is not empty."""

    numbers: list[int] = []
    request_id: str = ""


class Drain(msgspec.Struct, tag=True, frozen=True):
    """The server is about to stop: the engine takes no more requests, and ends those that it has with an
    error when the time is up. Drained is the answer, when none is left.
    """

    timeout_s: float


class Ready(msgspec.Struct, tag=True, frozen=True):
    """The engine's answer to Hello."""

    info: EngineInfo


class Outputs(msgspec.Struct, tag=True, frozen=True):
    """All that one step has for one client."""

    outputs: list[Output]


class Refused(msgspec.Struct, tag=True, frozen=True):
    """A request that ends with an error. fault: the client's, a full queue's, or the engine's own."""

    number: int
    reason: str
    fault: Fault

    @classmethod
    def because_of(cls, number: int, error: Exception) -> Refused:
        """Tells a client whose fault an error is: its own, the full queue's, or the engine's."""
        fault: Fault = (
            "client"
            if isinstance(error, RequestError)
            else "queue"
            if isinstance(error, QueueFullError)
            else "engine"
        )
        return cls(number, str(error), fault)

    @property
    def error(self) -> Exception:
        """What the client of the engine raises."""
        return {"client": RequestError, "queue": QueueFullError, "engine": EngineError}[self.fault](
            self.reason
        )


class Drained(msgspec.Struct, tag=True, frozen=True):
    """No request is left, and none is taken any more. Of the num_found that were there, num_cut had to be
    ended.
    """

    num_found: int
    num_cut: int


ToEngine = Hello | Submit | Cancel | Drain
FromEngine = Ready | Outputs | Statistics | Refused | Drained
