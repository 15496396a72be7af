"""What can go wrong, by what to do about it."""

from __future__ import annotations

import re
from typing import Any


class PagetideError(Exception):
    """Says in one sentence what went wrong."""


class InvalidRequestError(PagetideError):
    """The request cannot be served as it is; the message names the field and what is allowed."""


class ServerBusyError(PagetideError):
    """The queue is full: come back later, or start another server."""


class ServerUnavailableError(PagetideError):
    """Nobody answers at this address, or the server is starting: check the address, or come back later."""


class EngineError(PagetideError):
    """The server failed at this request: its log says why."""


class RequestTimeoutError(PagetideError):
    """The answer was not whole within the call's timeout; the request has been cancelled."""


# Errors come as text, in Triton's words or the engine's.
_BY_TEXT: tuple[tuple[str, type[PagetideError]], ...] = (
    (r"Exceeds maximum queue size", ServerBusyError),
    (r"internal error|the engine failed at this request", EngineError),
    (r"^the engine |Stub process|is not ready|failed to connect|Connection refused", ServerUnavailableError),
)


def error_of(cause: Any) -> PagetideError:
    """From tritonclient's InferenceServerException."""
    message = re.sub(r"^in ensemble '[^']*', ", "", cause.message() or "the server gave no reason")
    if "UNAVAILABLE" in (cause.status() or ""):
        return ServerUnavailableError(message)
    for pattern, kind in _BY_TEXT:
        if re.search(pattern, message):
            return kind(message)
    return InvalidRequestError(message)
