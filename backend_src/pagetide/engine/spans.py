"""A request's life as spans: the whole, and in it waiting, the prompt and the answer.

Attributes have the names of OpenTelemetry's conventions for generative AI
(https://opentelemetry.io/docs/specs/semconv/gen-ai), latencies those of vLLM.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from pagetide.engine.sequence import SequenceGroup
from pagetide.tracing import context_of

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer


class RequestSpans:
    """A writer of the journal. wall_ns: the clock of traces."""

    def __init__(self, tracer: Tracer, model: str, wall_ns: Callable[[], int] = time.time_ns):
        self._tracer, self._model, self._wall_ns = tracer, model, wall_ns

    def __call__(self, group: SequenceGroup, end_ns: int, error: BaseException | None) -> None:
        from opentelemetry.trace import Status, StatusCode, set_span_in_context

        offset = self._wall_ns() - end_ns
        parent = context_of(group.request.traceparent)
        whole = self._tracer.start_span("llm_request", parent, start_time=group.arrival_ns + offset)
        if not whole.is_recording():
            return
        whole.set_attributes(self._attributes(group, end_ns))
        if error is not None:
            whole.set_status(Status(StatusCode.ERROR, type(error).__name__))
        inside = set_span_in_context(whole)
        for name, begin, end in _parts(group, end_ns):
            self._tracer.start_span(name, inside, start_time=begin + offset).end(end + offset)
        whole.end(end_ns + offset)

    def _attributes(self, group: SequenceGroup, end_ns: int) -> dict[str, Any]:
        request, params = group.request, group.request.params
        facts = {
            "gen_ai.request.model": self._model,
            "gen_ai.request.id": request.request_id,
            "gen_ai.request.max_tokens": params.max_tokens,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.request.top_k": params.top_k,
            "gen_ai.request.choice.count": params.n,
            "gen_ai.usage.input_tokens": len(request.prompt_ids),
            "gen_ai.usage.cache_read.input_tokens": group.num_cached,
            "gen_ai.usage.output_tokens": group.num_generated,
            "gen_ai.response.finish_reasons": group.reasons,
            "gen_ai.latency.time_in_queue": _seconds(group, group.first_scheduled_ns),
            "gen_ai.latency.time_to_first_token": _seconds(group, group.first_token_ns),
            "gen_ai.latency.e2e": _seconds(group, end_ns),
        }
        return {name: value for name, value in facts.items() if value is not None}


def _seconds(group: SequenceGroup, until: int) -> float | None:
    return (until - group.arrival_ns) / 1e9 if until else None


def _parts(group: SequenceGroup, end_ns: int) -> Iterator[tuple[str, int, int]]:
    """(name, begin, end) of what the request has come to."""
    yield "queue", group.arrival_ns, group.first_scheduled_ns or end_ns
    if group.first_scheduled_ns:
        yield "prefill", group.first_scheduled_ns, group.first_token_ns or end_ns
    if group.first_token_ns:
        yield "decode", group.first_token_ns, end_ns
