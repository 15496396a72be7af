"""A request's spans, from the gateway to the engine, at a collector that listens here."""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import tritonclient.grpc as grpc
from client import CACHE, generate, inputs, start, wait_for
from gateway import Gateway
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from test_faults import ask_health
from triton_server import TritonServer, free_address

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PROMPT = {"text_input": "Once upon a time", "max_tokens": 8, "ignore_eos": True}


class Collector:
    """Keeps the spans that it is sent: (service, span). Triton's come as JSON."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, Any]] = []
        self.parents: dict[str, tuple[str, str]] = {}  # Triton's: name and parent by id
        collector = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if "json" in self.headers["Content-Type"]:
                    collector.keep_tritons(json.loads(body))
                    body = b""
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    service = attributes(resource.resource)["service.name"]
                    found = [span for scope in resource.scope_spans for span in scope.spans]
                    collector.spans += [(service, span) for span in found]
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}/v1/traces"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def keep_tritons(self, told: dict[str, Any]) -> None:
        scopes = [scope for resource in told["resourceSpans"] for scope in resource["scopeSpans"]]
        self.parents |= {
            span["spanId"]: (span["name"], span.get("parentSpanId", ""))
            for scope in scopes
            for span in scope["spans"]
        }

    def above(self, span: Any) -> tuple[list[str], str]:
        """The names of Triton's spans above one, as far as they have come, and what is above those."""
        names: list[str] = []
        above = span.parent_span_id.hex()
        while above in self.parents:
            name, above = self.parents[above]
            names.append(name)
        return names, above

    def of_trace(self, trace: str, count: int) -> dict[str, Any]:
        """So many spans of a trace, by name."""

        def found() -> dict[str, Any]:
            return {span.name: span for _, span in self.spans if span.trace_id.hex() == trace}

        wait_for(lambda: len(found()) >= count, 30, f"{count} spans, there are {list(found())}")
        return found()


def attributes(holder: Any) -> dict[str, Any]:
    def value(one: Any) -> Any:
        kind = one.WhichOneof("value")
        return [value(x) for x in one.array_value.values] if kind == "array_value" else getattr(one, kind)

    return {one.key: value(one.value) for one in holder.attributes}


@pytest.fixture(scope="module")
def collector() -> Collector:
    return Collector()


@pytest.fixture(scope="module")
def server(collector) -> Iterator[TritonServer]:
    server = start({"cache_dir": CACHE, "num_blocks": 600, "otlp_traces_endpoint": collector.endpoint})
    yield server
    server.stop()


@pytest.fixture
def traced(collector) -> Iterator[TritonServer]:
    """Triton tells of itself too."""
    settings = {"cache_dir": CACHE, "num_blocks": 600, "otlp_traces_endpoint": collector.endpoint}
    server = TritonServer(free_address(), settings, traces=collector.endpoint)
    server.start()
    server.wait_until_ready()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def gateway(server, collector) -> Iterator[Gateway]:
    gateway = Gateway(server, "--otlp-traces-endpoint", collector.endpoint)
    yield gateway
    gateway.stop()


def test_a_call_of_the_gateway_has_the_engines_spans_in_its_own(gateway, collector):
    begin = time.time_ns()
    body = {"model": "ensemble", "prompt": "Once upon a time", "max_tokens": 8, "ignore_eos": True}
    status, _ = gateway.ask("/v1/completions", body, {"traceparent": f"00-{TRACE}-{PARENT}-01"})
    end = time.time_ns()
    assert status == 200
    spans = collector.of_trace(TRACE, 5)
    call, whole = spans["POST /v1/completions"], spans["llm_request"]
    assert call.parent_span_id.hex() == PARENT and whole.parent_span_id == call.span_id
    assert attributes(call) == {
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "http.route": "/v1/completions",
    }
    told = attributes(whole)
    assert told["gen_ai.usage.output_tokens"] == told["gen_ai.request.max_tokens"] == 8
    assert told["gen_ai.usage.input_tokens"] > 2 and told["gen_ai.response.finish_reasons"] == ["length"]
    assert not any("Once" in str(value) for value in told.values()), "what was said is nobody's"
    parts = [spans[name] for name in ("queue", "prefill", "decode")]
    assert all(part.parent_span_id == whole.span_id for part in parts)
    times = [t for part in parts for t in (part.start_time_unix_nano, part.end_time_unix_nano)]
    assert times == sorted(times) and begin <= call.start_time_unix_nano <= times[0] + 10**6
    assert whole.start_time_unix_nano == times[0] and whole.end_time_unix_nano == times[-1] <= end
    assert {service for service, span in collector.spans} >= {"pagetide", "pagetide-gateway"}


def test_triton_clients_name_their_trace_themselves(server, collector):
    def traceparent(trace: str) -> str:
        return f"00-{trace}-{PARENT}-01"

    assert generate(server, {**PROMPT, "traceparent": traceparent("1" * 32)}, "ensemble_unary")[0] == 200
    with grpc.InferenceServerClient(server.address.grpc) as client:
        parameters = {"traceparent": traceparent("2" * 32)}
        client.infer("ensemble_unary", inputs(grpc, PROMPT), parameters=parameters)
    for trace in ("1" * 32, "2" * 32):
        assert collector.of_trace(trace, 4)["llm_request"].parent_span_id.hex() == PARENT


def test_what_is_not_to_be_recorded_is_not(gateway, server, collector):
    unsampled = "3" * 32
    body = {"model": "ensemble", "prompt": "Hi", "max_tokens": 2}
    assert gateway.ask("/v1/completions", body, {"traceparent": f"00-{unsampled}-{PARENT}-00"})[0] == 200
    before = len(collector.spans)
    # No valid context begins a trace of its own.
    assert generate(server, {**PROMPT, "traceparent": "nonsense"}, "ensemble_unary")[0] == 200
    wait_for(lambda: len(collector.spans) >= before + 4, 30, "spans of a trace of its own")
    assert not any(span.trace_id.hex() == unsampled for _, span in collector.spans)


def test_who_asks_whether_the_server_is_well_leaves_no_trace(gateway, server, collector):
    assert ask_health(server) == (0, "the engine answers")
    wait_for(lambda: gateway.status("/health") == 200, what="a healthy gateway, by its own probes")
    marker = {**PROMPT, "traceparent": f"00-{'6' * 32}-{PARENT}-01"}
    assert generate(server, marker, "ensemble_unary")[0] == 200
    collector.of_trace("6" * 32, 4)
    assert not any(span.trace_id.hex() == f"{1:032x}" for _, span in collector.spans)
    alone = [span for _, span in collector.spans if not span.parent_span_id and span.name == "llm_request"]
    assert len(alone) <= 1, "only the one of the test above, whose parent was none"


def test_an_error_is_told_by_its_kind(server, collector):
    asked = {**PROMPT, "guided_decoding_guide_type": "regex", "guided_decoding_guide": "(", "max_tokens": 4}
    asked["traceparent"] = f"00-{'4' * 32}-{PARENT}-01"
    status, answer = generate(server, asked, "ensemble_unary")
    assert status == 400, answer
    span = collector.of_trace("4" * 32, 2)["llm_request"]
    assert span.status.code == 2 and span.status.message == "RequestError"


def test_tritons_own_spans_are_between_the_gateways_and_the_engines(traced, collector):
    """Some are lost where a client cancels a stream behind its last response; the gateway does not."""
    traces = [f"{number:032x}" for number in range(0x500, 0x510)]
    gateway = Gateway(traced, "--otlp-traces-endpoint", collector.endpoint)
    try:
        for trace in traces:
            body = {"model": "ensemble", "prompt": "Once upon a time", "max_tokens": 8}
            headers = {"traceparent": f"00-{trace}-{PARENT}-01"}
            assert gateway.ask("/v1/completions", body, headers)[0] == 200
        all_spans = [collector.of_trace(trace, 5) for trace in traces]
        requests = [spans["llm_request"] for spans in all_spans]

        def num_with(count: int) -> int:
            return sum(len(collector.above(one)[0]) >= count for one in requests)

        wait_for(lambda: num_with(3) >= len(requests) - 2, 30, "Triton's spans")
        for spans in all_spans:
            names, top = collector.above(spans["llm_request"])
            assert names == ["llm", "ensemble", "InferRequest"][: len(names)]
            assert len(names) < 3 or top == spans["POST /v1/completions"].span_id.hex()
    finally:
        gateway.stop()


def test_a_collector_that_is_gone_costs_no_answer(collector, server):
    collector.server.shutdown()
    collector.server.server_close()
    for _ in range(3):
        assert generate(server, PROMPT, "ensemble_unary")[0] == 200
        time.sleep(0.5)
    assert generate(server, PROMPT, "ensemble_unary")[0] == 200
