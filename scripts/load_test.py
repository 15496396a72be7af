"""Sweeps arrival rates: requests of realistic lengths arrive at random (Poisson) at a running server, over
gRPC and through the OpenAI gateway; throughput is drawn against times, with the knee marked.

.venv/bin/python scripts/load_test.py 127.0.0.1:8001 http://127.0.0.1:9000 [--rates 1 2 4] [--seconds 30]

Each finished rate is kept in --out at once: started again, the sweep goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "clients"))

import numpy as np
from load_user import Answer, make_user, random_prompt
from tqdm import tqdm

MAX_SECONDS_LEFT = 120.0  # for the answers that are on their way when the last request has arrived
QUICK_MS = 500.0  # a first token that nobody calls late
# Medians and spreads of lognormal lengths, as conversations have them.
PROMPT_WORDS, ANSWER_TOKENS = (60, 0.8, 4, 400), (60, 0.7, 4, 256)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "urls", nargs="+", help="host:port of Triton's gRPC, or http://host:port of a gateway"
    )
    parser.add_argument(
        "--rates", nargs="+", type=float, help="requests a second; doubled until it is too much"
    )
    parser.add_argument("--seconds", type=float, default=30.0, help="how long requests arrive at each rate")
    parser.add_argument(
        "--out", type=Path, default=Path("load_test.json"), help="figures; the plot lies beside it"
    )
    parser.add_argument("--fresh", action="store_true", help="forget what --out holds")
    return parser.parse_args()


def lognormal(rng: random.Random, median: float, spread: float, low: int, high: int) -> int:
    return min(max(round(rng.lognormvariate(math.log(median), spread)), low), high)


class Load:
    """Requests to one server. Each has a connection of its own while it runs; connections are used again."""

    def __init__(self, url: str):
        self._url = url
        self._idle: list[Any] = []
        self._lock = threading.Lock()
        self._num_open = 0
        self._ended = threading.Event()
        self.answers: list[Answer] = []

    def send(self, prompt: str, max_tokens: int) -> None:
        with self._lock:
            user = self._idle.pop() if self._idle else None
            self._num_open += 1
            self._ended.clear()
        if user is None:
            user = make_user(self._url, lambda answer: self._end(user, answer))
        user.send(prompt, max_tokens)

    def _end(self, user: Any, answer: Answer) -> None:
        with self._lock:
            self.answers.append(answer)
            self._idle.append(user)
            self._num_open -= 1
            if not self._num_open:
                self._ended.set()

    def wait(self) -> int:
        """Returns how many requests have not ended in time."""
        self._ended.wait(MAX_SECONDS_LEFT)
        return self._num_open

    def close(self) -> None:
        for user in self._idle:
            user.close()


def measure(url: str, rate: float, seconds: float) -> dict[str, Any]:
    """One point of the curve."""
    rng = random.Random(f"{rate} {seconds}")
    load = Load(url)
    begin, arrival, sent = time.monotonic(), 0.0, 0
    with tqdm(total=round(seconds), desc=f"{url}, {rate:g}/s", unit="s", leave=False) as progress:
        while True:
            arrival += rng.expovariate(rate)
            if arrival > seconds:
                break
            time.sleep(max(0.0, begin + arrival - time.monotonic()))
            prompt = random_prompt(rng, lognormal(rng, *PROMPT_WORDS))
            load.send(prompt, lognormal(rng, *ANSWER_TOKENS))
            sent += 1
            progress.update(min(round(arrival), progress.total) - progress.n)
        unfinished = load.wait() if sent else 0
    load.close()
    return summary(url, rate, sent, unfinished, load.answers, begin)


def summary(
    url: str, rate: float, sent: int, unfinished: int, answers: list[Answer], begin: float
) -> dict[str, Any]:
    """Figures of the requests that were answered; times in ms."""
    good = [answer for answer in answers if answer.chunks and not answer.error]
    first = [1000 * (answer.chunks[0][0] - answer.sent) for answer in good]
    between = []
    for answer in good:
        rest = sum(count for _, count in answer.chunks[1:])
        if rest:
            between.append(1000 * (answer.chunks[-1][0] - answer.chunks[0][0]) / rest)
    # From the first arrival to the last end, without what one answer takes: the last ones run alone.
    whole = sorted(answer.chunks[-1][0] - answer.sent for answer in good)
    took = max((answer.chunks[-1][0] for answer in good), default=begin + 1) - begin
    took = max(took - whole[len(whole) // 2], 0.5 * took) if whole else took
    tokens = sum(count for answer in good for _, count in answer.chunks)
    found = {"url": url, "rate": rate, "sent": sent, "failed": len(answers) - len(good) + unfinished}
    found |= {"finished_s": len(good) / took, "tokens_s": tokens / took}
    for name, values in (("ttft", first), ("tpot", between)):
        for percent in (50, 99):
            found[f"{name}_p{percent}"] = float(np.percentile(values, percent)) if values else None
    return found


def is_too_much(point: dict[str, Any]) -> bool:
    """The server finishes clearly less than what arrives."""
    return point["failed"] > 0 or point["finished_s"] < 0.75 * point["rate"]


def knee(points: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The highest rate of which the server keeps up with nine tenths, while first tokens (p99) take at most
    half a second, or four times what they take at the lowest rate.
    """
    points = sorted(points, key=lambda point: point["rate"])
    good = [
        point
        for point in points
        if not point["failed"]
        and point["finished_s"] >= 0.9 * point["rate"]
        and point["ttft_p99"] <= max(QUICK_MS, 4 * points[0]["ttft_p99"])
    ]
    return good[-1] if good else None


def rates_of(asked: list[float] | None, points: list[dict[str, Any]]) -> Iterator[float]:
    """The rates of one server; `points` grows meanwhile."""
    if asked:
        yield from asked
        return
    rate = 0.5
    while not points or not is_too_much(points[-1]):
        yield rate
        rate *= 2


COLUMNS = ("rate", "finished_s", "tokens_s", "ttft_p50", "ttft_p99", "tpot_p50", "tpot_p99", "failed")


def table(points: list[dict[str, Any]]) -> str:
    lines = ["| server | " + " | ".join(COLUMNS) + " |", "|" + " --- |" * (len(COLUMNS) + 1)]
    for point in points:
        cells = [f"{point[name]:.4g}" if point[name] is not None else "-" for name in COLUMNS]
        lines.append(f"| {point['url']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(points: list[dict[str, Any]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, places = pyplot.subplots(1, 2, figsize=(11, 4.5))
    for url in dict.fromkeys(point["url"] for point in points):
        own = sorted(
            (p for p in points if p["url"] == url and p["ttft_p50"]), key=lambda point: point["rate"]
        )
        best = knee(own)
        for place, name in zip(places, ("ttft", "tpot"), strict=True):
            throughput = [point["tokens_s"] for point in own]
            (line,) = place.plot(throughput, [p[f"{name}_p50"] for p in own], "o-", label=f"{url}, p50")
            color = line.get_color()
            place.plot(throughput, [p[f"{name}_p99"] for p in own], "o--", color=color, label="p99")
            if best:
                place.plot(best["tokens_s"], best[f"{name}_p99"], "*", color=color, markersize=16)
    titles = ("time to first token", "time per output token")
    for place, title in zip(places, titles, strict=True):
        place.set(xlabel="output tokens/s", ylabel=f"{title}, ms", yscale="log", title=title)
        place.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def main() -> int:
    options = parse()
    known = [] if options.fresh or not options.out.exists() else json.loads(options.out.read_text())
    points: list[dict[str, Any]] = []
    for url in options.urls:
        own: list[dict[str, Any]] = []
        for rate in rates_of(options.rates, own):
            same = [p for p in known if (p["url"], p["rate"], p["seconds"]) == (url, rate, options.seconds)]
            point = same[0] if same else {**measure(url, rate, options.seconds), "seconds": options.seconds}
            own.append(point)
            points.append(point)
            if not same:
                known.append(point)
                options.out.write_text(json.dumps(known, indent=1))
    print(table(points))
    for url in options.urls:
        best = knee([point for point in points if point["url"] == url])
        print(
            f"{url}: the knee is at {best['rate']:g} requests/s"
            if best
            else f"{url}: no rate is below the knee"
        )
    draw(points, options.out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
