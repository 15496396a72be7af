"""Load on streams, with the times that matter for tokens in Locust's own statistics.

locust -f clients/locustfile.py --headless -u 32 -r 8 -t 60s --stop-timeout 60 --host 127.0.0.1:8001
locust -f clients/locustfile.py --headless -u 32 -r 8 -t 60s --stop-timeout 60 --host http://127.0.0.1:9000

The first speaks gRPC with Triton, the second with the OpenAI gateway.

   time to first token      from sending to the first chunk
   gap between chunks       of one answer; Locust shows p50, p99 and the longest
   time per output token    of each answer, after its first chunk
   chunks per answer        a count, in the columns of times
   answer                   from sending to the last chunk; its length is the number of tokens

Times are taken where the bytes arrive: by plain threads in a process beside Locust (clients/load_user.py),
since Locust's greenlets would look at a clock only when it is their turn. `--processes -1` runs one Locust,
and one such process, on each core: for hundreds of users.
"""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import gevent
from gevent.queue import Queue
from locust import User, constant, events, task
from locust.argument_parser import LocustArgumentParser


@events.init_command_line_parser.add_listener
def _add_options(parser: LocustArgumentParser) -> None:
    for name, low, high in (("words", 10, 60), ("tokens", 16, 64)):
        what = "words of a prompt" if name == "words" else "tokens of an answer"
        parser.add_argument(f"--min-{name}", type=int, default=low, help=f"fewest {what}, {low} by default")
        parser.add_argument(f"--max-{name}", type=int, default=high, help=f"most {what}, {high} by default")


class Connections:
    """The process that speaks for all users of this Locust."""

    _numbers = itertools.count()
    _only: Connections | None = None

    def __init__(self, url: str):
        command = [sys.executable, str(Path(__file__).with_name("load_user.py")), url]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self._answers: dict[int, Queue] = {}
        gevent.spawn(self._read)

    @classmethod
    def of(cls, url: str) -> Connections:
        if cls._only is None:
            cls._only = cls(url)
        return cls._only

    def join(self) -> int:
        """A new user's number."""
        number = next(self._numbers)
        self._answers[number] = Queue()
        return number

    def ask(self, number: int, num_words: int, max_tokens: int) -> dict[str, Any]:
        """Waits for the whole answer."""
        self._write({"user": number, "words": num_words, "max_tokens": max_tokens})
        return self._answers[number].get()

    def leave(self, number: int) -> None:
        self._write({"user": number, "leaves": True})

    def _write(self, order: dict[str, Any]) -> None:
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()

    def _read(self) -> None:
        for line in self._process.stdout:
            answer = json.loads(line)
            self._answers[answer["user"]].put(answer)
        for answers in self._answers.values():
            answers.put({"sent": 0.0, "chunks": [], "error": "the process of the connections has ended"})


class StreamingUser(User):
    """Sends one prompt after the other and reads each answer to its end."""

    wait_time = constant(0)

    def on_start(self) -> None:
        self.connections = Connections.of(self.host)
        self.number = self.connections.join()

    def on_stop(self) -> None:
        self.connections.leave(self.number)

    @task
    def complete(self) -> None:
        options = self.environment.parsed_options
        num_words, max_tokens = (
            random.randint(options.min_words, options.max_words),
            random.randint(options.min_tokens, options.max_tokens),
        )
        answer = self.connections.ask(self.number, num_words, max_tokens)
        times = [when for when, _ in answer["chunks"]]
        num_tokens = sum(count for _, count in answer["chunks"])
        if answer["error"] or not times:
            self.report("answer", 0.0, 0, RuntimeError(answer["error"] or "an answer without a chunk"))
            gevent.sleep(1)  # a server that is not there is not asked a thousand times a second
            return
        self.report("time to first token", times[0] - answer["sent"])
        for before, after in pairwise(times):
            self.report("gap between chunks", after - before)
        first = answer["chunks"][0][1]
        if num_tokens > first:
            self.report("time per output token", (times[-1] - times[0]) / (num_tokens - first))
        self.report("chunks per answer", len(times) / 1000)
        self.report("answer", times[-1] - answer["sent"], num_tokens)

    def report(self, name: str, seconds: float, length: int = 0, error: Exception | None = None) -> None:
        self.environment.events.request.fire(
            request_type="OpenAI" if self.host.startswith("http") else "gRPC",
            name=name,
            response_time=1000 * seconds,
            response_length=length,
            exception=error,
            context={},
        )
