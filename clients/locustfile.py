"""Load on the gRPC stream, with time to first token and time per output token in Locust's own statistics.

locust -f clients/locustfile.py --headless -u 32 -r 8 -t 60s --host 127.0.0.1:8001
"""

from __future__ import annotations

# gevent must know of gRPC before a channel is opened.
import grpc.experimental.gevent as grpc_gevent

grpc_gevent.init_gevent()

import random  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from pathlib import Path  # noqa: E402
from queue import Queue  # noqa: E402

import tritonclient.grpc as grpc  # noqa: E402
from locust import User, constant, task  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))

from grpc_stream import tensor  # noqa: E402

WORDS = ["tide", "moon", "harbour", "wind", "salt", "rope", "light", "wave", "sand", "storm", "ferry", "whale"]


class StreamingUser(User):
    """Sends one prompt after the other and reads each answer to its end."""

    wait_time = constant(0)

    def on_start(self) -> None:
        self.responses: Queue = Queue()
        self.client = grpc.InferenceServerClient(self.host)
        self.client.start_stream(lambda result, error: self.responses.put(error or result))

    def on_stop(self) -> None:
        self.client.stop_stream(cancel_requests=True)
        self.client.close()

    @task
    def complete(self) -> None:
        prompt = " ".join(random.choices(WORDS, k=random.randint(10, 60)))
        inputs = [tensor("text_input", prompt), tensor("max_tokens", random.randint(16, 64)), tensor("ignore_eos", True), tensor("stream", True)]
        begin, first, count = time.perf_counter(), 0.0, 0
        self.client.async_stream_infer("ensemble", inputs)
        while True:
            response = self.responses.get()
            now = time.perf_counter()
            if isinstance(response, Exception):
                self.report("answer", now - begin, 0, response)
                return
            first = first or now
            count += int(response.as_numpy("sequence_length")[0, 0])
            if response.as_numpy("finish_reason")[0]:
                break
        self.report("time to first token", first - begin, 0)
        if count > 1:
            self.report("time per output token", (now - first) / (count - 1), 0)
        self.report("answer", now - begin, count)

    def report(self, name: str, seconds: float, length: int, error: Exception | None = None) -> None:
        self.environment.events.request.fire(
            request_type="gRPC", name=name, response_time=1000 * seconds, response_length=length, exception=error, context={}
        )
