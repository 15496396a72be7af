"""The engine's statistics as Triton metrics (port 8002), all labelled `model`."""

from __future__ import annotations

from typing import Any

import triton_python_backend_utils as pb_utils

from pagetide.engine.messages import Statistics
from pagetide.serving.client import EngineSupervisor

GAUGES = {
    "running": ("pagetide_requests_running", "sequences that run"),
    "waiting": ("pagetide_requests_waiting", "sequences that wait for their turn"),
    "blocks_total": ("pagetide_kv_blocks_total", "KV cache blocks"),
    "blocks_used": ("pagetide_kv_blocks_used", "KV cache blocks that running sequences hold"),
    "blocks_cached": ("pagetide_kv_blocks_cached", "free KV cache blocks whose content can be found again"),
}
COUNTERS = {
    "prompt_tokens": ("pagetide_prompt_tokens", "tokens of admitted prompts"),
    "generated_tokens": ("pagetide_generated_tokens", "generated tokens"),
    "cached_tokens": ("pagetide_cached_prompt_tokens", "prompt tokens that the prefix cache held"),
    "preemptions": ("pagetide_preemptions", "sequences that gave their blocks to others"),
    "cancelled": ("pagetide_requests_cancelled", "requests that ended because nobody wanted them any more"),
}


class EngineMetrics:
    """Counters go on over restarts of the engine: what each engine counted since its start is added up."""

    def __init__(self, model: str, supervisor: EngineSupervisor):
        self._supervisor = supervisor
        self._labels = {"model": model}
        self._families: list[Any] = []  # a metric dies with its family
        self._gauges = {field: self._metric(*names, pb_utils.MetricFamily.GAUGE) for field, names in GAUGES.items()}
        self._counters = {field: self._metric(*names, pb_utils.MetricFamily.COUNTER) for field, names in COUNTERS.items()}
        self._restarts = self._metric("pagetide_engine_restarts", "times that the engine was started again", pb_utils.MetricFamily.GAUGE)
        self._before: Statistics | None = None

    def update(self, now: Statistics) -> None:
        for field, gauge in self._gauges.items():
            gauge.set(getattr(now, field))
        for field, counter in self._counters.items():
            value = getattr(now, field)
            before = getattr(self._before, field) if self._before is not None else 0
            # A smaller count than before comes from a new engine.
            counter.increment(value - before if value >= before else value)
        self._restarts.set(self._supervisor.num_restarts)
        self._before = now

    def _metric(self, name: str, description: str, kind: Any) -> Any:
        self._families.append(pb_utils.MetricFamily(name=name, description=description, kind=kind))
        return self._families[-1].Metric(labels=self._labels)

    def close(self) -> None:
        """Gives the metrics back while the stub can still do it: first they, then their families."""
        self._gauges.clear()
        self._counters.clear()
        self._restarts = None
        self._families.clear()
