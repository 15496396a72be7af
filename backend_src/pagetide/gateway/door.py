"""What happens before any route: keys, sizes, and who may call from another page."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from prometheus_client import Counter, Gauge
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware

from pagetide.gateway.errors import ApiError

log = logging.getLogger("pagetide.gateway")

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
    max_stall_s: a client that reads nothing for so long, while there is something to read, has left.
    """

    keys: tuple[str, ...] = ()
    max_body_bytes: int = 16 * 2**20
    origins: tuple[str, ...] = ()
    max_stall_s: float = 60.0


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
        """Counts what really comes: a body in chunks does not say its size. And ends what nobody reads:
        Triton would keep it all.
        """
        size, stalled = 0, asyncio.Event()
        loop = asyncio.get_running_loop()

        async def counting() -> Any:
            nonlocal size
            message = await _unless(stalled, receive)
            size += len(message.get("body", b""))
            if size > self._rules.max_body_bytes:
                raise self._too_large()
            return message

        async def answering(message: Any) -> None:
            # What the application says of a body that it could not read is not what was wrong.
            if size <= self._rules.max_body_bytes:
                timer = loop.call_later(self._rules.max_stall_s, stalled.set)
                try:
                    await send(message)
                finally:
                    timer.cancel()

        await self._app(scope, counting, answering)
        if size > self._rules.max_body_bytes:
            await self._too_large().response()(scope, receive, send)

    def _check(self, scope: Any) -> None:
        headers = Headers(scope=scope)
        if self._digests and not _is_open(scope):
            scope.setdefault("state", {})["user"] = self._user_of(headers.get("authorization", ""))
        size = headers.get("content-length", "0")
        if not size.isdigit() or int(size) > self._rules.max_body_bytes:
            raise self._too_large()

    def _user_of(self, header: str) -> str:
        """A name for who has this key, which does not tell it. Raises ApiError."""
        digest = hashlib.sha256(header.removeprefix("Bearer ").strip().encode()).digest()
        # All keys are compared, so that the time says nothing about any.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if not any(matches):
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")
        return f"key {digest.hex()[:16]}"

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body may have {self._rules.max_body_bytes} bytes at most")


async def _unless(stalled: asyncio.Event, receive: Receive) -> Any:
    """What comes from the client, which has left as soon as it is stalled."""
    waiting = asyncio.ensure_future(stalled.wait())
    receiving = asyncio.ensure_future(receive())
    try:
        await asyncio.wait((waiting, receiving), return_when=asyncio.FIRST_COMPLETED)
        if receiving.done():
            return receiving.result()
        log.warning("an answer is ended, since its client does not read it")
        return {"type": "http.disconnect"}
    finally:
        waiting.cancel()
        receiving.cancel()


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
