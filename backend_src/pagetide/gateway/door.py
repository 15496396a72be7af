"""What happens before any route: keys, sizes, and who may call from another page."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from prometheus_client import Counter, Gauge
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware

from pagetide.gateway.errors import ApiError

_OPEN = ("/health", "/metrics", "/", "/playground")
_OPEN_BELOW = "/playground/"  # plain files; what they ask for needs the key
_requests = Counter("pagetide_gateway_requests", "Requests by path and status", ["path", "status"])
_open_requests = Gauge("pagetide_gateway_requests_open", "Requests that are being answered")

Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]


@dataclass(frozen=True)
class Rules:
    """keys: who may come in; none: everyone. max_body_bytes: larger bodies are refused with 413.

    origins: web pages that may call; none by default, * for all.
    """

    keys: tuple[str, ...] = ()
    max_body_bytes: int = 16 * 2**20
    origins: tuple[str, ...] = ()


class Door:
    """ASGI middleware."""

    def __init__(self, app: Any, rules: Rules):
        self._rules = rules
        self._digests = [hashlib.sha256(key.encode()).digest() for key in rules.keys]
        self._app = app
        if rules.origins:
            self._app = CORSMiddleware(
                app, allow_origins=rules.origins, allow_methods=["*"], allow_headers=["*"]
            )

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check(scope)
        except ApiError as error:
            _requests.labels("refused", error.status).inc()
            await error.response()(scope, receive, send)
            return
        with _open_requests.track_inprogress():
            await self._answer(scope, receive, _counted(scope, send))

    async def _answer(self, scope: Any, receive: Receive, send: Send) -> None:
        """Counts what really comes: a body in chunks does not say its size."""
        size = 0

        async def counting() -> Any:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._rules.max_body_bytes:
                raise self._too_large()
            return message

        async def answering(message: Any) -> None:
            # What the application says of a body that it could not read is not what was wrong.
            if size <= self._rules.max_body_bytes:
                await send(message)

        await self._app(scope, counting, answering)
        if size > self._rules.max_body_bytes:
            await self._too_large().response()(scope, receive, send)

    def _check(self, scope: Any) -> None:
        headers = Headers(scope=scope)
        if self._digests and not _is_open(scope):
            self._check_key(headers.get("authorization", ""))
        size = headers.get("content-length", "0")
        if not size.isdigit() or int(size) > self._rules.max_body_bytes:
            raise self._too_large()

    def _check_key(self, header: str) -> None:
        digest = hashlib.sha256(header.removeprefix("Bearer ").strip().encode()).digest()
        # All keys are compared, so that the time says nothing about any.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if not any(matches):
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body may have {self._rules.max_body_bytes} bytes at most")


def _is_open(scope: Any) -> bool:
    """True for what everyone may ask."""
    path = scope["path"]
    return path in _OPEN or path.startswith(_OPEN_BELOW) or scope["method"] == "OPTIONS"


def _counted(scope: Any, send: Send) -> Send:
    async def counted(message: Any) -> None:
        if message["type"] == "http.response.start":
            route = scope.get("route")
            _requests.labels(getattr(route, "path", "unknown"), message["status"]).inc()
        await send(message)

    return counted
