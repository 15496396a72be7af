"""What goes wrong, as the OpenAI API says it: {"error": {"message", "type", "param", "code"}}.

https://platform.openai.com/docs/guides/error-codes
"""

from __future__ import annotations

import re
from collections.abc import Container

import grpc
from starlette.responses import JSONResponse

RETRY_AFTER_S = 1
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}
# Errors that are not the client's begin so (see serving/triton.py and serving/llm.py).
_TEXTS = (
    (500, r"internal error|the engine failed at this request"),
    (503, r"the engine |.*Stub process|.*is not ready"),
)
# Where the contract has another name for a field.
_OPENAI_NAMES = {"num_return_sequences": "n", "stop_words": "stop"}
_CODES = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 413,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 503,
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
        headers = {"Retry-After": str(RETRY_AFTER_S)} if self.status in (429, 503) else {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)


def refused(message: str, param: str | None = None) -> ApiError:
    """The request cannot be served as it is."""
    return ApiError(400, message, param)


def of_text(message: str) -> ApiError:
    """What Triton or the engine said in a stream, which has no codes."""
    message = re.sub(r"^in ensemble '[^']*', ", "", message)  # Triton's words
    if "Exceeds maximum queue size" in message:
        return ApiError(429, message, code="rate_limit_exceeded")
    return ApiError(next((status for status, text in _TEXTS if re.match(text, message)), 400), message)


def of_triton(code: grpc.StatusCode, message: str) -> ApiError:
    """What Triton said to a call that failed."""
    return ApiError(_CODES[code], message) if code in _CODES else of_text(message)


def named(error: ApiError, fields: Container[str]) -> ApiError:
    """The error with the field that its sentence begins with, if the client has sent such a one."""
    first = re.match(r"\w+", error.message)
    name = _OPENAI_NAMES.get(first[0], first[0]) if first else ""
    if error.param is None and name in fields:
        error.param = name
    return error
