"""Spans of requests for an OpenTelemetry collector (OTLP over HTTP), in the trace that a client has begun.

OpenTelemetry is imported only where a collector is named; its own environment variables hold
(OTEL_TRACES_SAMPLER, OTEL_EXPORTER_OTLP_HEADERS, ...: https://opentelemetry.io/docs/specs/otel/configuration).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span, Tracer

TRACEPARENT = "traceparent"  # https://www.w3.org/TR/trace-context
# Of requests that are nobody's, such as those that ask whether the server is well: not to be recorded.
UNRECORDED = f"00-{1:032x}-{1:016x}-00"
_VALID = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_DELAY_MS = 1000  # so long spans wait for others


def make_tracer(endpoint: str, service: str) -> Tracer:
    """endpoint: the collector's URL for traces, such as http://localhost:4318/v1/traces. Spans are sent by a
    thread of their own; a collector that is not there costs them, and a line in the log.
    """
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=Resource.create({"service.name": service}))
    exporter = OTLPSpanExporter(endpoint=endpoint)
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=_DELAY_MS))
    return provider.get_tracer("pagetide")


def valid(traceparent: Any) -> str:
    """As it is, or nothing if it is none."""
    return traceparent if isinstance(traceparent, str) and _VALID.fullmatch(traceparent) else ""


def nearest(client: str, server: str) -> str:
    """Whose child a span is: the server's own if that is in the client's trace, or there is no other."""
    return server if server and (not client or server.split("-")[1:2] == client.split("-")[1:2]) else client


def context_of(traceparent: str) -> Context:
    """What a span's parent is; without a valid one it begins a trace of its own."""
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract({TRACEPARENT: traceparent})


def traceparent_of(span: Span) -> str:
    """By which others can be its children."""
    from opentelemetry.trace import set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier, set_span_in_context(span))
    return carrier.get(TRACEPARENT, "")
