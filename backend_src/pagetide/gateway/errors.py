"""What goes wrong, as the OpenAI API says it: {"error": {"message", "type", "param", "code"}}.

https://platform.openai.com/docs/guides/error-codes
"""

from __future__ import annotations

import re
from collections.abc import Container

import grpc
from starlette.responses import JSONResponse

RETRY_AFTER_S = 1  # where the server does not say it
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}
_STEP_FAILED = r"Failed to process the request\(s\) for model instance '[^']*', message: "  # Triton's words
# Errors that are not the client's begin so (see serving/triton.py and serving/llm.py).
_TEXTS = (
    (500, r"internal error|the engine failed at this request"),
    (503, r"the engine |the server is stopping|Request for unknown model"),
    (503, rf"({_STEP_FAILED})?(Stub process '|Model '[^']*' is not ready)"),
)
# Where the contract has another name for a field.
_OPENAI_NAMES = {"num_return_sequences": "n", "stop_words": "stop", "text_input": "prompt"}
_CODES = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 413,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 503,
    grpc.StatusCode.CANCELLED: 503,
    grpc.StatusCode.UNIMPLEMENTED: 503,
}


class ApiError(Exception):
    """Answered with this HTTP status; message: one sentence that a client may read; param: the field."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code

    def body(self) -> dict[str, dict[str, str | None]]:
        """The error object."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The whole answer; it says when to come back where that helps."""
        headers = {"Retry-After": self._retry_after()} if self.status in (429, 503) else {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)

    def _retry_after(self) -> str:
        found = re.search(r"again in (\d+) s$", self.message)
        return found[1] if found else str(RETRY_AFTER_S)


def refused(message: str, param: str | None = None) -> ApiError:
    """The request cannot be served as it is."""
    return ApiError(400, message, param)


def failed() -> ApiError:
    """Something that should not happen has, and is in the log."""
    return ApiError(500, "the gateway failed; its log says why")


def of_text(message: str) -> ApiError:
    """What Triton or the engine said in a stream, which has no codes."""
    message = re.sub(r"^in ensemble '[^']*', ", "", message)  # Triton's words
    if re.match(r"Exceeds maximum queue size|the server is full", message):
        return ApiError(429, message, code="rate_limit_exceeded")
    return ApiError(next((status for status, text in _TEXTS if re.match(text, message)), 400), message)


# What gRPC itself says under codes that Triton uses for errors of its own.
_LOST = re.compile(r"RST_STREAM|GOAWAY|[Ss]ocket closed|[Ss]tream removed|[Cc]onnection reset|recvmsg")


def of_triton(code: grpc.StatusCode, message: str) -> ApiError:
    """What Triton said to a call that failed, or gRPC where nobody did."""
    # A model that is being loaded anew is unknown for a while: the gateway has asked for the names before.
    told = of_text(message)
    if told.status == 429:
        return told
    if code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN) and _LOST.search(message):
        return ApiError(503, f"the connection to Triton was lost: {message}")
    return ApiError(_CODES[code], message) if code in _CODES else told


def named(error: ApiError, fields: Container[str]) -> ApiError:
    """The error with the field that its sentence begins with, if the client has sent such a one."""
    first = re.match(r"\w+", error.message)
    name = _OPENAI_NAMES.get(first[0], first[0]) if first else ""
    if error.param is None and name in fields:
        error.param = name
    return error
