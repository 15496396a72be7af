"""Measures the way out alone: engine's client, Triton, postprocessing and front end, with an engine that
computes nothing (scripts/stand_in_engine.py) and has a token for every stream at fixed times.

Called by scripts/benchmark.py --way-out. The clients are plain tritonclients in threads, on the same cores.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import engines
import streams
from triton_server import REPOSITORY, ROOT, TritonServer

ANSWER_TOKENS = (400, 600)
STEP_MS = 10.0  # 256 streams then have 25,600 tokens a second
SETTLED_S = 3.0  # in which all users have begun
MODEL = """import sys

sys.path.insert(0, {source!r})

from pagetide.serving.supervisor import EngineSupervisor

EngineSupervisor.command = {command!r}

from pagetide.serving.llm import LlmModel as TritonPythonModel
"""


@dataclass
class WayOut:
    """paced: as beside an engine on a CPU, which needs the same cores.

    offered: tokens a second that the engine has for its clients.
    """

    users: int
    paced: bool
    offered: float
    figures: streams.StreamFigures


@contextmanager
def started_server(device: str, max_running: int) -> Iterator[TritonServer]:
    """Triton on our models, of which `llm` starts the stand-in."""
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder) / "models"
        (repository / "llm" / "1").mkdir(parents=True)
        for entry in REPOSITORY.iterdir():
            if entry.is_dir() and entry.name != "llm":
                (repository / entry.name).symlink_to(entry)
        shutil.copy(REPOSITORY / "llm" / "config.pbtxt", repository / "llm")
        command = (sys.executable, str(ROOT / "scripts" / "stand_in_engine.py"), device, str(STEP_MS))
        source = MODEL.format(source=str(ROOT / "backend_src"), command=command)
        (repository / "llm" / "1" / "model.py").write_text(source)
        with engines.started_server(max_running, repository=repository) as server:
            yield server


def measure(users: list[int], seconds: float) -> list[WayOut]:
    rows = []
    for device in ("cpu", "cuda"):
        with started_server(device, max(users)) as server:
            for count in users:
                print(f"{count} users, {device} ...", file=sys.stderr, flush=True)
                rows.append(measure_users(server, count, seconds, device == "cpu"))
    return rows


def measure_users(server: TritonServer, count: int, seconds: float, paced: bool) -> WayOut:
    everyone = [streams.User(server.address.grpc, i, [], ANSWER_TOKENS) for i in range(count)]
    begin = time.monotonic() + SETTLED_S
    end = begin + seconds
    threads = [threading.Thread(target=user.run, args=(end,)) for user in everyone]
    for thread in threads:
        thread.start()
    time.sleep(max(0.0, begin - time.monotonic()))
    before = streams.processor_times(server)
    time.sleep(max(0.0, end - time.monotonic()))
    used = streams.processor_times(server) - before
    for thread in threads:
        thread.join()
    if errors := [user.error for user in everyone if user.error]:
        raise RuntimeError(f"{len(errors)} of {count} users got an error: {errors[0]}")
    figures = streams.evaluate(everyone, count, begin, end, used, STEP_MS)
    return WayOut(count, paced, count * 1000 / STEP_MS, figures)


def table(rows: list[WayOut]) -> str:
    lines = [
        "| users | sending | tokens/s | of what the engine offers | gap p50 / p99 ms | worst gap / p50 | "
        "TTFT p50 / p90 ms |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        found = row.figures
        worst = found.unfairness * found.gap_p99 / found.gap_p50
        lines.append(
            f"| {row.users} | {'in rounds' if row.paced else 'at once'} | {found.tokens_per_s:.0f} | "
            f"{100 * found.tokens_per_s / row.offered:.0f} % | {found.gap_p50:.0f} / {found.gap_p99:.0f} | "
            f"{worst:.1f} | {found.ttft_p50:.1f} / {found.ttft_p90:.1f} |"
        )
    return "\n".join(lines)


def as_json(rows: list[WayOut]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]
