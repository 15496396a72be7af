"""A user who sends one prompt after the other and remembers when each chunk of the answer came, by the
clock of the thread that received it.

As a program it speaks for many users, in a process of its own, whose threads no event loop delays
(clients/locustfile.py starts it):

python clients/load_user.py 127.0.0.1:8001                  Triton's gRPC
python clients/load_user.py http://127.0.0.1:9000           the OpenAI gateway

reads   lines of JSON {"user", "words", "max_tokens"} or {"user", "leaves": true}
writes  lines of JSON {"user", "sent", "chunks": [[when, tokens], ...], "error"}; times in seconds
"""

from __future__ import annotations

import http.client
import json
import os
import random
import sys
import threading
import time
import urllib.parse
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
        self._leaves, self._is_whole = False, True
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
        self._answer, self._is_whole = Answer(time.monotonic()), False
        self._client.async_stream_infer("ensemble", inputs, outputs=self._outputs)

    def _receive(self, result: Any, error: Any) -> None:
        now = time.monotonic()
        if self._leaves:
            return
        if error is not None:
            self._answer.error, self._is_whole = error.message(), True
            self._on_end(self._answer)
            return
        self._answer.chunks.append((now, int(result.as_numpy("sequence_length").item())))
        if result.get_response().parameters["triton_final_response"].bool_param:
            self._is_whole = True
            self._on_end(self._answer)

    def close(self) -> None:
        """Leaves; an answer that is not whole is cancelled."""
        self._leaves = True
        # One that is cancelled after its last answer, and not closed, stays in Triton 2.51 for good.
        self._client.stop_stream(cancel_requests=not self._is_whole)
        self._client.close()


class OpenAIUser:
    """The same over the gateway's completions, each on a connection of its own: servers close idle ones.

    on_end runs on a thread of the answer's own.
    """

    def __init__(self, url: str, on_end: Callable[[Answer], None]):
        self._on_end = on_end
        self._leaves = False
        self._connection = http.client.HTTPConnection(urllib.parse.urlsplit(url).netloc, timeout=600)

    def send(self, prompt: str, max_tokens: int) -> None:
        """Greedy, to the whole length."""
        body = {
            "prompt": prompt,
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        threading.Thread(target=self._run, args=(body, Answer(time.monotonic())), daemon=True).start()

    def _run(self, body: dict[str, Any], answer: Answer) -> None:
        try:
            headers = {"Content-Type": "application/json", **_authorization()}
            self._connection.close()
            self._connection.request("POST", "/v1/completions", json.dumps(body), headers)
            self._read(self._connection.getresponse(), answer)
        except (OSError, http.client.HTTPException, ValueError) as error:
            answer.error = str(error) or type(error).__name__
        if not self._leaves:
            self._on_end(answer)

    def _read(self, response: http.client.HTTPResponse, answer: Answer) -> None:
        if response.status != 200:
            answer.error = json.loads(response.read())["error"]["message"]
            return
        known = 0
        for line in response:
            now = time.monotonic()
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line.removeprefix(b"data: "))
            if "error" in chunk:
                answer.error = chunk["error"]["message"]
            elif chunk["usage"]["completion_tokens"] > known:
                answer.chunks.append((now, chunk["usage"]["completion_tokens"] - known))
                known = chunk["usage"]["completion_tokens"]

    def close(self) -> None:
        """Leaves; the gateway ends an answer that is not whole."""
        self._leaves = True
        self._connection.close()


def _authorization() -> dict[str, str]:
    key = os.environ.get("PAGETIDE_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


def make_user(url: str, on_end: Callable[[Answer], None]) -> LoadUser | OpenAIUser:
    """One for Triton's gRPC, or for a gateway if the address begins with http."""
    return OpenAIUser(url, on_end) if url.startswith("http") else LoadUser(url, on_end)


def main() -> None:
    url, rng = sys.argv[1], random.Random()
    users: dict[int, LoadUser | OpenAIUser] = {}
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
            users[number] = make_user(url, lambda answer, number=number: report(number, answer))
        users[number].send(random_prompt(rng, order["words"]), order["max_tokens"])
    for user in users.values():
        user.close()


if __name__ == "__main__":
    main()
