"""A user who sends one prompt after the other and remembers when each chunk of the answer came, by the
clock of the thread that received it.

As a program it speaks for many users, in a process of its own, whose threads no event loop delays
(clients/locustfile.py starts it):

python clients/load_user.py 127.0.0.1:8001

reads   lines of JSON {"user", "words", "max_tokens"} or {"user", "leaves": true}
writes  lines of JSON {"user", "sent", "chunks": [[when, tokens], ...], "error"}; times in seconds
"""

from __future__ import annotations

import json
import random
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import tritonclient.grpc as grpc
from grpc_stream import tensor

WORDS = [
    "tide",
    "moon",
    "harbour",
    "wind",
    "salt",
    "rope",
    "light",
    "wave",
    "sand",
    "storm",
    "ferry",
    "whale",
]


def random_prompt(rng: random.Random, num_words: int) -> str:
    return " ".join(rng.choices(WORDS, k=num_words))


@dataclass
class Answer:
    """Times in seconds of a monotonic clock. chunks: when each came, and how many tokens it brought.

    error: empty if there was none.
    """

    sent: float
    chunks: list[tuple[float, int]] = field(default_factory=list)
    error: str = ""


class LoadUser:
    """A connection of its own, on which one prompt at a time is answered.

    on_end runs on a thread of tritonclient.

    outputs: which ones are asked for beside sequence_length; None: all.
    """

    def __init__(
        self,
        url: str,
        on_end: Callable[[Answer], None],
        stream: bool = True,
        outputs: list[str] | None = None,
    ):
        self._on_end = on_end
        self._stream = stream
        self._outputs = (
            None
            if outputs is None
            else [grpc.InferRequestedOutput(name) for name in ("sequence_length", *outputs)]
        )
        self._answer = Answer(0.0)
        self._leaves = False
        self._client = grpc.InferenceServerClient(url)
        self._client.start_stream(self._receive)

    def send(self, prompt: str, max_tokens: int) -> None:
        """Greedy, to the whole length."""
        values = {
            "text_input": prompt,
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "temperature": 0.0,
            "stream": self._stream,
        }
        inputs = [tensor(name, value) for name, value in values.items()]
        self._answer = Answer(time.monotonic())
        self._client.async_stream_infer("ensemble", inputs, outputs=self._outputs)

    def _receive(self, result: Any, error: Any) -> None:
        now = time.monotonic()
        if self._leaves:
            return
        if error is not None:
            self._answer.error = error.message()
            self._on_end(self._answer)
            return
        self._answer.chunks.append((now, int(result.as_numpy("sequence_length").item())))
        if result.get_response().parameters["triton_final_response"].bool_param:
            self._on_end(self._answer)

    def close(self) -> None:
        """Leaves; an answer that is not whole is cancelled."""
        self._leaves = True
        self._client.stop_stream(cancel_requests=True)
        self._client.close()


def main() -> None:
    url, rng = sys.argv[1], random.Random()
    users: dict[int, LoadUser] = {}
    lock = threading.Lock()

    def report(number: int, answer: Answer) -> None:
        line = json.dumps(
            {"user": number, "sent": answer.sent, "chunks": answer.chunks, "error": answer.error}
        )
        with lock:
            print(line, flush=True)

    for line in sys.stdin:
        order = json.loads(line)
        number = order["user"]
        if order.get("leaves"):
            if number in users:
                users.pop(number).close()
            continue
        if number not in users:
            users[number] = LoadUser(url, lambda answer, number=number: report(number, answer))
        users[number].send(random_prompt(rng, order["words"]), order["max_tokens"])
    for user in users.values():
        user.close()


if __name__ == "__main__":
    main()
