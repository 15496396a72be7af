"""Each call's span, in the trace of its client, and as the parent of what Triton's engine tells of it."""

from __future__ import annotations

from typing import Any

from starlette.datastructures import Headers

from pagetide.tracing import TRACEPARENT, context_of, make_tracer, traceparent_of, valid


class Spans:
    """ASGI middleware. endpoint: a collector's URL for traces; without one the client's is passed on."""

    def __init__(self, app: Any, endpoint: str):
        self._app = app
        self._tracer = make_tracer(endpoint, "pagetide-gateway") if endpoint else None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state[TRACEPARENT] = valid(Headers(scope=scope).get(TRACEPARENT))
        if self._tracer is None:
            await self._app(scope, receive, send)
            return
        await self._traced(scope, receive, send)

    async def _traced(self, scope: Any, receive: Any, send: Any) -> None:
        from opentelemetry.trace import SpanKind, StatusCode

        assert self._tracer is not None
        state = scope["state"]
        span = self._tracer.start_span("POST", context_of(state[TRACEPARENT]), SpanKind.SERVER)
        span.set_attribute("http.request.method", "POST")
        state[TRACEPARENT] = traceparent_of(span)

        async def telling(message: Any) -> None:
            if message["type"] == "http.response.start":
                span.set_attribute("http.response.status_code", message["status"])
                if message["status"] >= 500:
                    span.set_status(StatusCode.ERROR)
            await send(message)

        try:
            await self._app(scope, receive, telling)
        finally:
            route = getattr(scope.get("route"), "path", "")
            span.update_name(f"POST {route}".strip())
            span.set_attribute("http.route", route)
            span.end()
