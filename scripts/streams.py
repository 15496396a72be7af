"""Measures how streams flow: users who send one prompt after the other, over gRPC through `ensemble`,
beside the engine alone under the same load.

   users   closed loop; each prompt has 10 to 60 words, each answer 16 to 64 tokens, greedy, at full length
   gap     time between two chunks of one answer, at the client; TTFT: from sending to the first chunk
   fair    the worst stream's longest gap as a multiple of all streams' p99
   cost    processor time for each chunk, by process

Called by scripts/benchmark.py --streams and --chunks. Times are those of a plain tritonclient in threads;
the first seconds of a run are left out.
"""

from __future__ import annotations

import json
import random
import re
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import psutil
from engines import CACHE, started_server
from load_user import Answer, LoadUser, random_prompt
from triton_server import ROOT, TritonServer
from workloads import MAX_RUNNING

WARM_UP_S = 3.0


@dataclass
class StreamFigures:
    """Times in ms. processor_ms: for each chunk, by process; step_ms: of the engine, while the users ran."""

    users: int
    tokens_per_s: float
    chunks_per_answer: float
    gap_p50: float
    gap_p99: float
    unfairness: float
    ttft_p50: float
    ttft_p90: float
    step_ms: float
    processor_ms: dict[str, float]
    engine_tokens_per_s: float = 0.0

    @property
    def share(self) -> float:
        """Of the engine alone."""
        return self.tokens_per_s / self.engine_tokens_per_s if self.engine_tokens_per_s else 0.0


class User:
    """One closed loop. num_tokens: of each answer, from and to."""

    def __init__(
        self, address: str, number: int, outputs: list[str] | None, num_tokens: tuple[int, int] = (16, 64)
    ):
        self._num_tokens = num_tokens
        self._rng = random.Random(number)
        self._done = threading.Event()
        self._connection = LoadUser(address, self._end, outputs=outputs)
        self.answers: list[Answer] = []

    def _end(self, answer: Answer) -> None:
        self.answers.append(answer)
        self._done.set()

    @property
    def error(self) -> str:
        return next((answer.error for answer in self.answers if answer.error), "")

    def run(self, until: float) -> None:
        while time.monotonic() < until and not self.error:
            self._done.clear()
            prompt = random_prompt(self._rng, self._rng.randint(10, 60))
            self._connection.send(prompt, self._rng.randint(*self._num_tokens))
            if not self._done.wait(300):
                self.answers.append(Answer(0.0, error="no answer within 300 s"))
        self._connection.close()


def serve_alone(seconds: float, max_running: int) -> None:
    """Answers each number of users on standard input with the engine's own tokens a second."""
    from pagetide.llm import LLM

    llm = LLM(cache_dir=CACHE, max_num_seqs=max_running)
    for line in sys.stdin:
        print(json.dumps(engine_alone(int(line), seconds, llm)), flush=True)


def measure_beside_engine(users: list[int], seconds: float) -> list[StreamFigures]:
    """Engine alone and server take turns for each number of users."""
    max_running = max(MAX_RUNNING, *users)  # every user streams
    alone_options = ["--streams-alone", str(max_running), "--seconds", str(seconds)]
    command = [sys.executable, str(ROOT / "scripts" / "benchmark.py"), *alone_options]
    alone = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert alone.stdin is not None and alone.stdout is not None
    rows = []
    with started_server(max_running) as server:
        for count in users:
            print(f"{count} users ...", file=sys.stderr, flush=True)
            row = measure(server, count, seconds)
            print(count, file=alone.stdin, flush=True)
            row.engine_tokens_per_s = json.loads(alone.stdout.readline())
            rows.append(row)
    alone.stdin.close()
    alone.wait()
    return rows


def measure_chunks(users: int, seconds: float) -> dict[str, StreamFigures]:
    """What a chunk costs, and where, by what its client asks for."""
    with started_server() as server:
        return {name: measure(server, users, seconds, outputs) for name, outputs in WAYS.items()}


def num_steps(server: TritonServer) -> float:
    """That the engine has made so far."""
    name = "pagetide_step_tokens_count"
    with urllib.request.urlopen(f"http://{server.address.metrics}/metrics", timeout=10) as answer:
        found = re.search(rf"^{name}{{.*}} (\S+)$", answer.read().decode(), re.MULTILINE)
    assert found is not None, name
    return float(found[1])


def measure(
    server: TritonServer,
    users: int,
    seconds: float,
    outputs: list[str] | None = None,
) -> StreamFigures:
    """Runs the users. outputs: as LoadUser's."""
    everyone = [User(server.address.grpc, i, outputs) for i in range(users)]
    begin = time.monotonic() + WARM_UP_S
    end = begin + seconds
    threads = [threading.Thread(target=user.run, args=(end,)) for user in everyone]
    for thread in threads:
        thread.start()
    time.sleep(max(0.0, begin - time.monotonic()))
    before, steps_before = processor_times(server), num_steps(server)
    time.sleep(max(0.0, end - time.monotonic()))
    after, steps = processor_times(server), num_steps(server) - steps_before
    for thread in threads:
        thread.join()
    if errors := [user.error for user in everyone if user.error]:
        raise RuntimeError(f"{len(errors)} of {users} users got an error: {errors[0]}")
    return evaluate(everyone, users, begin, end, after - before, 1000 * seconds / max(steps, 1))


def evaluate(
    everyone: list[User], users: int, begin: float, end: float, used: Counter[str], step_ms: float
) -> StreamFigures:
    all_answers = [answer for user in everyone for answer in user.answers]
    answers = [answer for answer in all_answers if answer.sent >= begin - WARM_UP_S / 2]
    own = [
        [1000 * (b[0] - a[0]) for a, b in pairwise(answer.chunks) if begin <= b[0] <= end]
        for answer in answers
    ]
    gaps = sorted(gap for some in own for gap in some) or [0.0]
    ttft = sorted(1000 * (answer.chunks[0][0] - answer.sent) for answer in answers)
    inside = [chunk for answer in all_answers for chunk in answer.chunks if begin <= chunk[0] <= end]
    p99 = quantile(gaps, 0.99)
    return StreamFigures(
        users=users,
        tokens_per_s=sum(count for _, count in inside) / (end - begin),
        chunks_per_answer=statistics.mean(len(answer.chunks) for answer in answers),
        gap_p50=quantile(gaps, 0.5),
        gap_p99=p99,
        unfairness=max((max(some) for some in own if some), default=0.0) / p99 if p99 else 0.0,
        ttft_p50=quantile(ttft, 0.5),
        ttft_p90=quantile(ttft, 0.9),
        step_ms=step_ms,
        processor_ms={name: 1000 * value / max(len(inside), 1) for name, value in used.items()},
    )


def quantile(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def processor_times(server: TritonServer) -> Counter[str]:
    """Seconds of processor time so far, by what a process is for."""
    times: Counter[str] = Counter()
    for process in [*server.processes(), psutil.Process()]:
        line = " ".join(process.cmdline())
        names = (
            "preprocessing",
            "postprocessing",
            "llm_unary",
            "models/llm/",
            "pagetide.engine",
            "tritonserver",
        )
        name = next((name for name in names if name in line), "client")
        used = process.cpu_times()
        times[{"models/llm/": "llm", "pagetide.engine": "engine"}.get(name, name)] += used.user + used.system
    return times


def engine_alone(users: int, seconds: float, llm: Any) -> float:
    """Tokens a second of the engine in this process under the same load."""
    from pagetide.types import Request, SamplingParams

    engine, tokenizer = llm.engine, llm.get_tokenizer()
    rngs, numbers = [random.Random(i) for i in range(users)], iter(range(10**6, 10**9))
    owner: dict[int, int] = {}

    def send(user: int) -> None:
        rng, number = rngs[user], next(numbers)
        ids = tokenizer(random_prompt(rng, rng.randint(10, 60))).input_ids
        params = SamplingParams(temperature=0, max_tokens=rng.randint(16, 64), ignore_eos=True)
        engine.add(Request(number=number, prompt_ids=ids, params=params, stream=True))
        owner[number] = user

    for user in range(users):
        send(user)
    begin = time.monotonic() + WARM_UP_S
    count = 0
    while (now := time.monotonic()) < begin + seconds:
        for output in engine.step().outputs:
            count += len(output.ids) if now >= begin else 0
            if output.finish_reason:
                send(owner.pop(output.number))
    engine.cancel(list(owner))
    while engine.has_work:
        engine.step()
    return count / seconds


def table(rows: list[StreamFigures]) -> str:
    lines = [
        "| users | tokens/s | of the engine alone | chunks per answer | gap p50 / p99 ms | worst "
        "stream / p99 | TTFT p50 / p90 ms | step ms |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        share = f"{100 * row.share:.0f} %" if row.share else ""
        lines.append(
            f"| {row.users} | {row.tokens_per_s:.0f} | {share} | {row.chunks_per_answer:.1f} | "
            f"{row.gap_p50:.0f} / {row.gap_p99:.0f} "
            f"| {row.unfairness:.1f} | {row.ttft_p50:.0f} / {row.ttft_p90:.0f} | {row.step_ms:.1f} |"
        )
    return "\n".join(lines)


# What a client asks for beside the length.
WAYS: dict[str, list[str] | None] = {"no text": [], "its text": ["text_output"], "all outputs": None}
PROCESSES = {
    "llm": "stub of llm",
    "postprocessing": "stub of postprocessing",
    "tritonserver": "core and front end",
    "client": "client",
}


def cost_table(rows: dict[str, StreamFigures]) -> str:
    """Processor time for each chunk, by what was asked for and where it was spent: all but the engine's
    would not be there without a server.
    """
    lines = [
        f"| ms for each chunk | {' | '.join(PROCESSES.values())} | together |",
        "| --- |" + " --- |" * (len(PROCESSES) + 1),
    ]
    for name, row in rows.items():
        times = [row.processor_ms.get(process, 0.0) for process in PROCESSES]
        lines.append(f"| {name} | " + " | ".join(f"{value:.2f}" for value in (*times, sum(times))) + " |")
    return "\n".join(lines)


def as_json(rows: list[StreamFigures]) -> list[dict[str, Any]]:
    return [asdict(row) | {"share": row.share} for row in rows]
