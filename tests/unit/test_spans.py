"""What a request's spans say of requests that have not come far, and whose children they are."""

from __future__ import annotations

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from pagetide.engine.sequence import SequenceGroup
from pagetide.engine.spans import RequestSpans
from pagetide.tracing import nearest
from pagetide.types import Request, RequestError, SamplingParams

SECOND = 10**9
WALL = 1_700_000_000 * SECOND


def spans_of(end_ns, error=None, traceparent="", **times):
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    request = Request(
        number=1,
        prompt_ids=[5, 6, 7],
        params=SamplingParams(max_tokens=4),
        request_id="mine",
        traceparent=traceparent,
    )
    group = SequenceGroup(request, None, None, 10 * SECOND)
    for name, value in times.items():
        setattr(group, name, value * SECOND)
    write = RequestSpans(provider.get_tracer("test"), "a-model", lambda: WALL)
    write(group, end_ns * SECOND, error)
    return {span.name: span for span in exporter.get_finished_spans()}


def seconds(span):
    """Before the wall clock's now, at which the request ended."""
    return (WALL - span.start_time) / SECOND, (WALL - span.end_time) / SECOND


def test_times_are_on_the_wall_clock():
    spans = spans_of(20, first_scheduled_ns=12, first_token_ns=15)
    assert {name: seconds(span) for name, span in spans.items()} == {
        "llm_request": (10, 0),
        "queue": (10, 8),
        "prefill": (8, 5),
        "decode": (5, 0),
    }
    told = dict(spans["llm_request"].attributes)
    assert told["gen_ai.request.model"] == "a-model" and told["gen_ai.request.id"] == "mine"
    assert told["gen_ai.latency.time_in_queue"] == 2 and told["gen_ai.latency.time_to_first_token"] == 5
    assert told["gen_ai.latency.e2e"] == 10 and told["gen_ai.usage.input_tokens"] == 3


@pytest.mark.parametrize(
    "times, names", [({}, {"queue"}), ({"first_scheduled_ns": 11}, {"queue", "prefill"})]
)
def test_a_request_that_ends_early_has_what_it_came_to(times, names):
    spans = spans_of(13, RequestError("the prompt is a secret"), **times)
    assert spans.keys() == names | {"llm_request"} and max(seconds(s)[0] for s in spans.values()) == 3
    whole = spans["llm_request"]
    assert not whole.status.is_ok and whole.status.description == "RequestError"
    assert "gen_ai.latency.time_to_first_token" not in whole.attributes


@pytest.mark.parametrize("traceparent", ["", "nonsense", "00-" + "0" * 32 + "-" + "0" * 16 + "-01"])
def test_without_a_valid_parent_a_trace_begins(traceparent):
    assert spans_of(13, traceparent=traceparent)["llm_request"].parent is None


CLIENT, OF_TRITON, OTHER = (f"00-{trace * 32}-{span * 16}-01" for trace, span in ("1a", "1b", "2c"))


@pytest.mark.parametrize(
    "client, server, wanted",
    [
        ("", "", ""),
        (CLIENT, "", CLIENT),
        ("", OTHER, OTHER),
        (CLIENT, OF_TRITON, OF_TRITON),
        (CLIENT, OTHER, CLIENT),
    ],
)
def test_the_nearest_span_of_the_clients_trace_is_the_parent(client, server, wanted):
    assert nearest(client, server) == wanted
