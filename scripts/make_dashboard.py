"""Writes Grafana's dashboard, docker/grafana/dashboards/pagetide.json, from the table in this file.

python scripts/make_dashboard.py
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).resolve().parents[1] / "docker" / "grafana" / "dashboards" / "pagetide.json"
WIDTH, HEIGHT = 8, 8  # of a panel; Grafana's page is 24 wide
MODEL = '{model=~"$model"}'


@dataclass(frozen=True)
class Panel:
    """queries: PromQL by legend. unit: Grafana's name."""

    title: str
    unit: str
    queries: dict[str, str]


def quantiles(metric: str) -> dict[str, str]:
    rates = f"sum by (le) (rate(pagetide_{metric}_bucket{MODEL}[$__rate_interval]))"
    return {f"p{100 * q:.0f}": f"histogram_quantile({q}, {rates})" for q in (0.5, 0.9, 0.99)}


def rate(metric: str) -> str:
    return f"sum(rate({metric}{MODEL}[$__rate_interval]))"


def gauge(metric: str) -> str:
    return f"sum({metric}{MODEL})"


def mean(histogram: str) -> str:
    return f"{rate(f'{histogram}_sum')} / {rate(f'{histogram}_count')}"


def of_cache(blocks: str) -> str:
    return f"{gauge(f'pagetide_kv_blocks_{blocks}')} / {gauge('pagetide_kv_blocks_total')}"


ROWS: dict[str, list[Panel]] = {
    "Traffic": [
        Panel(
            "Tokens a second",
            "none",
            {"answers": rate("pagetide_generated_tokens"), "prompts": rate("pagetide_prompt_tokens")},
        ),
        Panel("Requests that end a second", "reqps", {"ended": rate("pagetide_request_seconds_count")}),
        Panel(
            "Gateway's answers a second, by status",
            "reqps",
            {"{{status}}": "sum by (status) (rate(pagetide_gateway_requests_total[$__rate_interval]))"},
        ),
    ],
    "Latency": [
        Panel("Time to first token", "s", quantiles("time_to_first_token_seconds")),
        Panel("Time per output token", "s", quantiles("time_per_output_token_seconds")),
        Panel("Time in the queue", "s", quantiles("queue_seconds")),
        Panel("Whole requests", "s", quantiles("request_seconds")),
        Panel("Between two chunks of a stream", "s", quantiles("chunk_gap_seconds")),
    ],
    "Engine": [
        Panel(
            "Sequences",
            "none",
            {"running": gauge("pagetide_requests_running"), "waiting": gauge("pagetide_requests_waiting")},
        ),
        Panel(
            "Tokens and sequences of a step",
            "none",
            {"tokens": mean("pagetide_step_tokens"), "sequences": mean("pagetide_step_sequences")},
        ),
        Panel("Steps a second", "none", {"steps": rate("pagetide_step_tokens_count")}),
        Panel(
            "KV cache",
            "percentunit",
            {"held": of_cache("used"), "kept for reuse": of_cache("cached")},
        ),
        Panel(
            "Prompt tokens from the prefix cache",
            "percentunit",
            {"share": f"{rate('pagetide_cached_prompt_tokens')} / {rate('pagetide_prompt_tokens')}"},
        ),
        Panel(
            "Preemptions, cancels, failures a second",
            "none",
            {
                "preempted": rate("pagetide_preemptions"),
                "cancelled": rate("pagetide_requests_cancelled"),
                "out of time": rate("pagetide_requests_timed_out"),
                "failed": rate("pagetide_requests_failed"),
            },
        ),
        Panel(
            "Engine runs",
            "none",
            {"up": f"min(pagetide_engine_up{MODEL})", "restarts": gauge("pagetide_engine_restarts")},
        ),
    ],
    "GPU (Triton's own metrics)": [
        Panel("Busy", "percentunit", {"GPU {{gpu_uuid}}": "nv_gpu_utilization"}),
        Panel("Memory", "bytes", {"GPU {{gpu_uuid}}": "nv_gpu_memory_used_bytes"}),
        Panel("Power", "watt", {"GPU {{gpu_uuid}}": "nv_gpu_power_usage"}),
    ],
}


def queries() -> list[str]:
    """Of all panels."""
    return [query for panels in ROWS.values() for panel in panels for query in panel.queries.values()]


def dashboard() -> dict[str, Any]:
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS.items():
        panels.append(
            {"id": len(panels) + 1, "type": "row", "title": title, "panels": [], "collapsed": False}
            | {"gridPos": {"x": 0, "y": y, "w": 24, "h": 1}}
        )
        for number, panel in enumerate(row):
            at = {"x": number % 3 * WIDTH, "y": y + 1 + number // 3 * HEIGHT, "w": WIDTH, "h": HEIGHT}
            panels.append(_panel(panel, len(panels) + 1, at))
        y += 1 + -(-len(row) // 3) * HEIGHT
    return {
        "uid": "pagetide",
        "title": "Pagetide",
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": [_model_variable()]},
        "panels": panels,
    }


def _panel(panel: Panel, number: int, at: dict[str, int]) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "prometheus"}
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "datasource": source,
        "gridPos": at,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + i), "expr": query, "legendFormat": legend, "datasource": source}
            for i, (legend, query) in enumerate(panel.queries.items())
        ],
    }


def _model_variable() -> dict[str, Any]:
    query = "label_values(pagetide_requests_running, model)"
    return {
        "name": "model",
        "label": "model",
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "prometheus"},
        "query": {"query": query, "refId": "models"},
        "definition": query,
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def text() -> str:
    return json.dumps(dashboard(), indent=2) + "\n"


def main() -> int:
    is_new = not FILE.exists() or FILE.read_text() != text()
    FILE.parent.mkdir(parents=True, exist_ok=True)
    FILE.write_text(text())
    print(f"changed: {FILE.name if is_new else 'none'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
