"""The engine's statistics as Triton metrics (port 8002), all labelled `model`.

Each change of a metric is a message to the server, which takes as long as sending a chunk: a thread of its
own does it, in the time between chunks.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from bisect import bisect_right
from collections.abc import Callable
from enum import Enum, auto
from typing import Any

import triton_python_backend_utils as pb_utils

from pagetide.engine.statistics import Statistics
from pagetide.serving.supervisor import EngineSupervisor

log = logging.getLogger("pagetide.metrics")

GAUGES = {
    "running": ("pagetide_requests_running", "sequences that run"),
    "waiting": ("pagetide_requests_waiting", "sequences that wait for their turn"),
    "blocks_total": ("pagetide_kv_blocks_total", "KV cache blocks"),
    "blocks_used": ("pagetide_kv_blocks_used", "KV cache blocks that running sequences hold"),
    "kv_usage": ("pagetide_kv_usage", "share of the KV cache blocks that running sequences hold"),
    "blocks_cached": ("pagetide_kv_blocks_cached", "free KV cache blocks whose content can be found again"),
}
COUNTERS = {
    "prompt_tokens": ("pagetide_prompt_tokens", "tokens of admitted prompts"),
    "generated_tokens": ("pagetide_generated_tokens", "generated tokens"),
    "cached_tokens": ("pagetide_cached_prompt_tokens", "prompt tokens that the prefix cache held"),
    "drafted_tokens": ("pagetide_draft_tokens", "tokens that speculative decoding guessed"),
    "accepted_tokens": ("pagetide_accepted_draft_tokens", "guesses that were right"),
    "preemptions": ("pagetide_preemptions", "sequences that gave their blocks to others"),
    "swapped_out": ("pagetide_kv_blocks_swapped_out", "KV cache blocks copied to the host's memory"),
    "swapped_in": ("pagetide_kv_blocks_swapped_in", "KV cache blocks that came back from there"),
    "cancelled": ("pagetide_requests_cancelled", "requests that ended because nobody wanted them any more"),
    "timed_out": ("pagetide_requests_timed_out", "requests that ended because their time was up"),
    "failed": ("pagetide_requests_failed", "requests that could not be answered"),
    "restarts": ("pagetide_engine_restarts", "times that the engine was started again"),
}
ENGINE_UP = ("pagetide_engine_up", "1 while there is an engine that takes requests, 0 while there is none")
_WRITE_S = 1.0  # between two writings of what is added up
# Bounds for 1 ms and for 100 s.
_SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250]
_COUNTS = [float(2**i) for i in range(15)]
# Of each request.
HISTOGRAMS = {
    "ttft_s": ("pagetide_time_to_first_token_seconds", "arrival to first token", _SECONDS),
    "tpot_s": ("pagetide_time_per_output_token_seconds", "time between the tokens of an answer", _SECONDS),
    "e2e_s": ("pagetide_request_seconds", "arrival to end", _SECONDS),
    "queue_s": ("pagetide_queue_seconds", "arrival to admission", _SECONDS),
}
# Of each chunk and step: so many that they are added up here (Triton takes single observations only, each
# of them a message).
ADDED_HISTOGRAMS = {
    "gap_s": (
        "pagetide_chunk_gap_seconds",
        "time between two chunks of an answer, as they are sent",
        _SECONDS,
    ),
    "step_tokens": ("pagetide_step_tokens", "tokens of an engine step", _COUNTS),
    "step_sequences": ("pagetide_step_sequences", "sequences of an engine step", _COUNTS),
}
# The names of other engines' dashboards, by the setting metric_names: statistics field -> (name, labels).
OTHER_NAMES: dict[str, dict[str, tuple[str, dict[str, str]]]] = {
    "pagetide": {},
    "vllm": {
        "running": ("vllm:num_requests_running", {}),
        "waiting": ("vllm:num_requests_waiting", {}),
        "kv_usage": ("vllm:kv_cache_usage_perc", {}),
        "prompt_tokens": ("vllm:prompt_tokens_total", {}),
        "generated_tokens": ("vllm:generation_tokens_total", {}),
        "drafted_tokens": ("vllm:spec_decode_num_draft_tokens_total", {}),
        "accepted_tokens": ("vllm:spec_decode_num_accepted_tokens_total", {}),
        "preemptions": ("vllm:num_preemptions_total", {}),
        "ttft_s": ("vllm:time_to_first_token_seconds", {}),
        "tpot_s": ("vllm:time_per_output_token_seconds", {}),
        "gap_s": ("vllm:inter_token_latency_seconds", {}),
        "e2e_s": ("vllm:e2e_request_latency_seconds", {}),
        "queue_s": ("vllm:request_queue_time_seconds", {}),
    },
    "trtllm": {
        "running": ("nv_trt_llm_request_metrics", {"request_type": "active"}),
        "waiting": ("nv_trt_llm_request_metrics", {"request_type": "waiting"}),
        "blocks_total": ("nv_trt_llm_kv_cache_block_metrics", {"kv_cache_block_type": "max"}),
        "blocks_used": ("nv_trt_llm_kv_cache_block_metrics", {"kv_cache_block_type": "used"}),
    },
}


class AddedHistogram:
    """A histogram as Prometheus reads it, made of counters: any number of observations is written at once,
    one message for each changed bucket.
    """

    def __init__(self, bounds: list[float], counter: Callable[[str, dict[str, str]], Any]):
        """counter(suffix, labels) makes a counter of the histogram."""
        self._bounds = bounds
        self._buckets = [
            counter("_bucket", {"le": label}) for label in (*(f"{bound:g}" for bound in bounds), "+Inf")
        ]
        self._count, self._sum = counter("_count", {}), counter("_sum", {})
        self._values: list[float] = []

    def observe(self, values: list[float]) -> None:
        """Remembers values until the next write()."""
        self._values += values

    def write(self) -> None:
        """Adds what has been observed to Triton's counters, one call for each bucket."""
        values, self._values = sorted(self._values), []
        if not values:
            return
        for bucket, bound in zip(self._buckets, (*self._bounds, math.inf), strict=True):
            if reached := bisect_right(values, bound):
                bucket.increment(reached)
        self._count.increment(len(values))
        self._sum.increment(sum(values))


class Engine(Enum):
    """Whether there is one."""

    UP = auto()
    DOWN = auto()


class EngineMetrics:
    """Counters go on over restarts of the engine: what each engine counted since its start is added up.

    update() and count_failed() return at once. take_gaps: seconds between chunks as sent, since the last
    call.
    """

    def __init__(
        self, model: str, names: str, supervisor: EngineSupervisor, take_gaps: Callable[[], list[float]]
    ):
        self._supervisor = supervisor
        self._take_gaps = take_gaps
        self._labels = {"model": model}
        self._families: dict[str, Any] = {}  # by name; a metric dies with its family
        self._others = OTHER_NAMES[names]
        kinds = pb_utils.MetricFamily
        self._gauges = {field: self._metrics(field, *about, kinds.GAUGE) for field, about in GAUGES.items()}
        self._counters = {
            field: self._metrics(field, *about, kinds.COUNTER) for field, about in COUNTERS.items()
        }
        self._histograms = {
            field: self._metrics(field, *about[:2], kinds.HISTOGRAM, about[2])
            for field, about in HISTOGRAMS.items()
        }
        self._engine_up = self._metric(*ENGINE_UP, kinds.GAUGE, {}, None)
        self._added = {
            field: self._added_histograms(field, *about) for field, about in ADDED_HISTOGRAMS.items()
        }
        self._added_at = 0.0
        self._before: dict[str, int] = {}
        self._shown: dict[str, float] = {}
        self._num_restarts = 0
        self._news: queue.SimpleQueue[Statistics | Engine | int | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="pagetide-metrics", daemon=True)
        self._thread.start()

    def update(self, now: Statistics) -> None:
        """Hands an engine's newest statistics to the thread that writes them; returns at once."""
        self._news.put(now)

    def count_failed(self, count: int) -> None:
        """Requests that an engine has taken with it."""
        self._news.put(count)

    def show_engine(self, engine: Engine) -> None:
        """The engine is there, or gone."""
        self._news.put(engine)

    def _run(self) -> None:
        while (news := self._next()) is not None:
            try:
                if isinstance(news, Statistics):
                    self._show(news)
                elif isinstance(news, Engine):
                    self._engine_up.set(news is Engine.UP)
                else:
                    self._increment("failed", news)
                self._write_added()
            except Exception:
                log.exception("a report of the engine could not be shown")

    def _next(self) -> Statistics | Engine | int | None:
        """None: close. 0 from time to time: the last chunks are sent after the engine's last report."""
        try:
            return self._news.get(timeout=_WRITE_S)
        except queue.Empty:
            return 0

    def _show(self, now: Statistics) -> None:
        # Gauges last: who sees that nothing runs any more finds everything counted.
        for field, values in now.observations.items():
            for histogram in self._added.get(field, ()):
                histogram.observe(values)
            for observed in self._histograms.get(field, ()):
                for value in values:
                    observed.observe(value)
        for field in self._counters.keys() & now.counters.keys():
            count, before = now.counters[field], self._before.get(field, 0)
            # A smaller count than before comes from a new engine.
            self._increment(field, count - before if count >= before else count)
        self._before = now.counters
        self._increment("restarts", self._supervisor.num_restarts - self._num_restarts)
        self._num_restarts = self._supervisor.num_restarts
        if not now.gauges["running"]:
            self._write_added(at_once=True)
        held, of_all = now.gauges["blocks_used"], now.gauges["blocks_total"]
        shown = {**now.gauges, "kv_usage": held / max(1, of_all)}
        for field, gauges in self._gauges.items():
            if self._shown.get(field) != shown[field]:
                self._shown[field] = shown[field]
                for gauge in gauges:
                    gauge.set(shown[field])

    def _write_added(self, at_once: bool = False) -> None:
        now = time.monotonic()
        if not at_once and now - self._added_at < _WRITE_S:
            return
        self._added_at = now
        gaps = self._take_gaps()
        for histogram in self._added["gap_s"]:
            histogram.observe(gaps)
        for histograms in self._added.values():
            for histogram in histograms:
                histogram.write()

    def _increment(self, field: str, by: int) -> None:
        if by:
            for counter in self._counters[field]:
                counter.increment(by)

    def _metrics(
        self, field: str, name: str, description: str, kind: Any, buckets: list[float] | None = None
    ) -> list[Any]:
        """A metric of ours, and the one that other dashboards know it by."""
        return [
            self._metric(its, description, kind, labels, buckets) for its, labels in self._names(field, name)
        ]

    def _names(self, field: str, name: str) -> list[tuple[str, dict[str, str]]]:
        """What a metric is called, with its labels: by us, and by the other engine whose dashboards are to
        work.
        """
        return [(name, {}), *([self._others[field]] if field in self._others else [])]

    def _added_histograms(
        self, field: str, name: str, description: str, bounds: list[float]
    ) -> list[AddedHistogram]:
        def histogram(its: str, labels: dict[str, str]) -> AddedHistogram:
            kind = pb_utils.MetricFamily.COUNTER
            return AddedHistogram(
                bounds, lambda suffix, more: self._metric(its + suffix, description, kind, {**labels, **more})
            )

        return [histogram(*named) for named in self._names(field, name)]

    def _metric(
        self,
        name: str,
        description: str,
        kind: Any,
        labels: dict[str, str],
        buckets: list[float] | None = None,
    ) -> Any:
        if name not in self._families:
            self._families[name] = pb_utils.MetricFamily(name=name, description=description, kind=kind)
        labels = {**self._labels, **labels}
        return (
            self._families[name].Metric(labels=labels, buckets=buckets)
            if buckets
            else self._families[name].Metric(labels=labels)
        )

    def close(self) -> None:
        """Gives the metrics back while the stub can still do it: first they, then their families."""
        self._news.put(None)
        self._thread.join()
        for metrics in (self._gauges, self._counters, self._histograms, self._added):
            metrics.clear()
        del self._engine_up
        self._families.clear()
