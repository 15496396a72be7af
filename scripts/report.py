"""Tables and plots of benchmark.py."""

from __future__ import annotations

import re
import statistics
from pathlib import Path

from engines import Figures
from workloads import workload


def shares(found: dict[str, dict[str, list[dict[str, float]]]]) -> str:
    """A table: each way's tokens/s as a share of the engine alone, and where answers stream its TTFT."""
    lines = [
        "| share of the engine alone (TTFT) | " + " | ".join(found) + " |",
        "|" + " --- |" * (len(found) + 1),
    ]
    for way in next(iter(found.values())):
        cells = [way]
        for by_way in found.values():
            share, ttft = (statistics.median(run[key] for run in by_way[way]) for key in ("share", "ttft_ms"))
            cells.append(f"{share:.0%}" + (f" ({ttft:.0f} ms)" if ttft else ""))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def rates(
    results: dict[str, dict[str, list[Figures]]],
    processes: dict[str, list[dict[str, float]]],
    names: list[str],
    limits: dict[str, float],
) -> str:
    """A table: tokens/s by engine and workload, in brackets the ratio to the faster transformers."""
    base = {
        name: max(
            (
                median_rate(runs[name])
                for engine, runs in results.items()
                if engine.startswith("transformers")
            ),
            default=None,
        )
        for name in names
    }
    header = ["engine", *names, "TTFT ms", "TPOT ms", "cold start s", "peak MB"]
    lines = [f"| {' | '.join(header)} |", "|" + " --- |" * len(header)]
    for engine, runs in results.items():
        cells = [engine]
        for name in names:
            rate, slowest = median_rate(runs[name]), base[name]
            cells.append(f"{rate:.1f}" if rate < 10 else f"{rate:.0f}")
            if slowest:
                cells[-1] += f" ({rate / slowest:.1f}x)"
        shown = runs["single" if "single" in names else names[0]]
        for attribute in ("ttft_s", "tpot_s"):
            values = [v for figure in shown if (v := getattr(figure, attribute)) is not None]
            cells.append(f"{1000 * statistics.median(values):.1f}" if values else "-")
        cells.append(f"{statistics.median(process['cold_s'] for process in processes[engine]):.1f}")
        cells.append(f"{max(process['peak_mb'] for process in processes[engine]):.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *_comparisons(results, names, limits)])


def _bits(engine: str) -> int:
    """Of a weight, where it is quantized; 0 where it is not."""
    found = re.search(r" (?:w|int|Q)(\d)", engine)
    return int(found[1]) if found else 0


def _comparisons(
    results: dict[str, dict[str, list[Figures]]], names: list[str], limits: dict[str, float]
) -> list[str]:
    """Pagetide beside the best other engine of each workload, and beside what the machine allows."""
    lines, ours = [], results.get("pagetide")
    for bits in (0, 8, 4):
        alike = [engine for engine in results if _bits(engine) == bits]
        own = [engine for engine in alike if engine.startswith("pagetide")]
        others = [engine for engine in alike if engine not in own]
        if not own or not others:
            continue
        if not bits and ours:
            own = ["pagetide"]  # and not what it is compared with elsewhere
        ratios = []
        for name in names:
            first, best = (
                max(group, key=lambda engine: median_rate(results[engine][name])) for group in (own, others)
            )
            ratio = median_rate(results[first][name]) / median_rate(results[best][name])
            ratios.append(f"{name} {ratio:.2f}x ({best})")
        form = f" in {bits} bits" if bits else ""
        lines.append(f"Pagetide{form} against the best other engine: {', '.join(ratios)}.")
    lines.append(
        f"Limits: memory read {limits['read_gb_s']:.0f} GB/s "
        f"({limits['best_read_gb_s']:.0f} at best), so at most "
        f"{limits['max_single_tokens_s']:.0f} tokens/s for one sequence "
        f"({limits['weights_mb']:.0f} MB of weights a step). Matrix products: "
        f"{limits['bfloat16_gflop_s']:.0f} GFLOP/s in bfloat16, "
        f"{limits['float32_gflop_s']:.0f} in float32 (torch)."
    )
    if ours:
        reached = [text for name in names for text in _reached(name, ours[name], limits)]
        lines.append(f"Pagetide reaches: {', '.join(reached)}.")
    return lines


def _reached(name: str, runs: list[Figures], limits: dict[str, float]) -> list[str]:
    """A workload's shares of what memory and products allow; nothing if it waits for requests to come, or if
    its prompts are not computed as often as they are sent.
    """
    jobs = workload(name)
    if name == "prefix" or any(job.at for job in jobs):
        return []
    num_new, num_prompt = sum(job.num_tokens for job in jobs), sum(len(job.prompt) for job in jobs)
    peak = 1e9 * limits["bfloat16_gflop_s"]
    if len(jobs) > 1:
        flop = 2 * (limits["layer_weights"] * (num_new + num_prompt) + limits["head_weights"] * num_new)
        return [f"{name} {median_rate(runs) * flop / num_new / peak:.0%} of the products' peak"]
    ttft, tpot = (
        statistics.median(value for run in runs if (value := getattr(run, key)) is not None)
        for key in ("ttft_s", "tpot_s")
    )
    flop = 2 * limits["layer_weights"] * num_prompt + limits["attention_flop"] * num_prompt**2 / 2
    num_bytes = limits["weights_mb"] * 1e6 + limits["kv_bytes"] * (num_prompt + num_new / 2)
    return [
        f"{name}: prompt {num_prompt / ttft:.0f} tokens/s ({flop / ttft / peak:.0%} of the products' peak), "
        f"decode {1 / tpot:.0f} tokens/s ({num_bytes / tpot / 1e9 / limits['read_gb_s']:.0%} of what memory "
        "allows)"
    ]


def arrivals(results: dict[str, dict[str, list[Figures]]], names: list[str]) -> str:
    """A table of waiting times for requests that come at random."""
    lines = [
        "| engine | requests/s | tokens/s | TTFT p50 ms | TTFT p99 | TPOT p50 ms | TPOT p99 |",
        "|" + " --- |" * 7,
    ]
    for name in names:
        for engine, runs in results.items():
            cells = [engine, name.partition(":")[2], f"{median_rate(runs[name]):.0f}"]
            for attribute in ("ttft_s", "ttft_p99_s", "tpot_s", "tpot_p99_s"):
                values = [value for run in runs[name] if (value := getattr(run, attribute)) is not None]
                cells.append(f"{1000 * statistics.median(values):.0f}" if values else "-")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def median_rate(runs: list[Figures]) -> float:
    return statistics.median(run.tokens_per_s for run in runs)


def draw(results: dict[str, dict[str, list[Figures]]], names: list[str], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(names), figsize=(3.2 * len(names), 0.5 * len(results) + 1.6), sharey=True
    )
    engines = list(results)[::-1]
    for axis, name in zip([axes] if len(names) == 1 else axes, names, strict=True):
        bars = axis.barh(engines, [median_rate(results[engine][name]) for engine in engines])
        for bar, engine in zip(bars, engines, strict=True):
            bar.set_color("#1f6f8b" if engine.startswith("pagetide") else "#b0b7bd")
        axis.bar_label(bars, fmt="%.0f", padding=2, fontsize=8)
        axis.set_title(name)
        axis.margins(x=0.18)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle("output tokens per second")
    figure.tight_layout()
    figure.savefig(file, dpi=130)
