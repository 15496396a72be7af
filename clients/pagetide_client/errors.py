"""What can go wrong, by what to do about it."""

from __future__ import annotations

import re

import grpc


class PagetideError(Exception):
    """Says in one sentence what went wrong."""


class InvalidRequestError(PagetideError):
    """The request cannot be served as it is; the message names the field and what is allowed."""


class ServerBusyError(PagetideError):
    """The queue is full: come back later, or start another server."""


class ServerUnavailableError(PagetideError):
    """Nobody answers at this address, or the server is starting or ending: check the address, or come back
    later.
    """


class EngineError(PagetideError):
    """The server failed at this request: its log says why."""


class RequestTimeoutError(PagetideError):
    """The answer was not whole within the call's timeout; the request has been cancelled."""


# In a stream errors come as text, in Triton's words or the engine's: what they begin with.
_STEP_FAILED = r"Failed to process the request\(s\) for model instance '[^']*', message: "
_BY_TEXT: tuple[tuple[str, type[PagetideError]], ...] = (
    (r"Exceeds maximum queue size|the server is full", ServerBusyError),
    (r"internal error|the engine failed at this request", EngineError),
    (r"the engine |the server is stopping", ServerUnavailableError),
    (rf"({_STEP_FAILED})?(Stub process '|Model '[^']*' is not ready)", ServerUnavailableError),
)
_BY_CODE = {
    grpc.StatusCode.UNAVAILABLE: ServerUnavailableError,
    grpc.StatusCode.CANCELLED: ServerUnavailableError,  # by the server, or by close()
    grpc.StatusCode.DEADLINE_EXCEEDED: RequestTimeoutError,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequestError,
    grpc.StatusCode.NOT_FOUND: InvalidRequestError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: InvalidRequestError,  # larger than a message may be
}


def error_of_text(message: str) -> PagetideError:
    """From what a response says instead of an answer."""
    message = re.sub(r"^in ensemble '[^']*', ", "", message)
    for pattern, kind in _BY_TEXT:
        if re.match(pattern, message):
            return kind(message)
    return InvalidRequestError(message)


def error_of_call(failure: grpc.RpcError) -> PagetideError:
    """From a call that failed as a whole."""
    kind = _BY_CODE.get(failure.code(), EngineError)
    if kind is RequestTimeoutError:
        return kind("the answer was not whole in time, and the request has been cancelled")
    return kind(failure.details() or str(failure.code()))


def ended_early() -> PagetideError:
    """A stream without a last response."""
    return ServerUnavailableError("the server ended the stream before the answer was whole")
