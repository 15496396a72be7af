"""A live view of what a server's engines do: requests, batch, KV blocks, prefix hits, tokens a second, times.

python scripts/top.py [--metrics-port 8002] [--host 127.0.0.1] [--interval 2] [--once]

Each row is one model; rates and times are of the interval before. Without a terminal a line for each model
and interval.
"""

from __future__ import annotations

import argparse
import http.client
import sys
import time
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "backend_src"))

from pagetide.gateway.status import read_metrics, samples
from rich.console import Console
from rich.live import Live
from rich.table import Table

PREFIX = "pagetide_"
COLUMNS = (
    "model",
    "running",
    "waiting",
    "KV used",
    "cached",
    "hit rate",
    "batch",
    "tokens/s",
    "first token",
    "per token",
    "preempted",
    "restarts",
)

Samples = dict[str, float]


def read(address: str) -> dict[str, Samples]:
    """What the server says now of each model: our samples by their names without the prefix.

    Raises OSError, HTTPException.
    """
    found: dict[str, Samples] = defaultdict(dict)
    for name, labels, value in samples(read_metrics(address)):
        if name.startswith(PREFIX) and "model" in labels and "le" not in labels:
            found[labels["model"]][name.removeprefix(PREFIX)] = value
    return found


def row(model: str, now: Samples, before: Samples, seconds: float) -> list[str]:
    """The cells of COLUMNS. before: the samples so many seconds ago; none for those of a new engine."""

    def gauge(name: str) -> float:
        return now.get(name, 0.0)

    def grown(name: str) -> float:
        # A counter that has fallen is that of an engine that has been started again.
        return max(0.0, gauge(name) - before.get(name, 0.0))

    def share(part: float, whole: float) -> str:
        return f"{part / whole:.0%}" if whole else "-"

    def mean(name: str, unit: float, end: str) -> str:
        count = grown(f"{name}_count")
        return f"{grown(f'{name}_sum') / count * unit:,.1f}{end}" if count else "-"

    blocks = gauge("kv_blocks_total")
    return [
        model,
        f"{gauge('requests_running'):.0f}",
        f"{gauge('requests_waiting'):.0f}",
        share(gauge("kv_blocks_used"), blocks),
        share(gauge("kv_blocks_cached"), blocks),
        share(grown("cached_prompt_tokens"), grown("prompt_tokens")),
        mean("step_sequences", 1, ""),
        f"{grown('generated_tokens') / seconds:,.0f}",
        mean("time_to_first_token_seconds", 1000, " ms"),
        mean("time_per_output_token_seconds", 1000, " ms"),
        f"{grown('preemptions'):.0f}",
        f"{gauge('engine_restarts'):.0f}",
    ]


def table(rows: list[list[str]], title: str) -> Table:
    made = Table(title=title, title_justify="left", expand=False)
    for index, name in enumerate(COLUMNS):
        made.add_column(name, justify="left" if index == 0 else "right")
    for cells in rows:
        made.add_row(*cells)
    return made


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="top.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--metrics-port", type=int, default=8002)
    parser.add_argument("--interval", type=float, default=2.0, help="seconds between two looks")
    parser.add_argument("--once", action="store_true", help="one interval, then end")
    options = parser.parse_args()
    if options.interval < 0.1:
        parser.error(f"the interval is {options.interval:g} s, must be 0.1 at least")
    address, console = f"{options.host}:{options.metrics_port}", Console()
    try:
        before, at = read(address), time.monotonic()
        with Live(console=console, auto_refresh=False, transient=False) as live:
            while True:
                time.sleep(options.interval)
                now, then = read(address), time.monotonic()
                rows = [row(model, now[model], before.get(model, {}), then - at) for model in sorted(now)]
                if console.is_terminal:
                    live.update(table(rows, address), refresh=True)
                else:
                    for cells in rows:
                        pairs = zip(COLUMNS, cells, strict=True)
                        print("  ".join(f"{name} {cell}" for name, cell in pairs), flush=True)
                if options.once:
                    return 0
                before, at = now, then
    except (OSError, http.client.HTTPException) as error:
        print(f"{address} does not answer: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())
