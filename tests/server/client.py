"""What the tests send to a real server, with the official clients, and what comes back as plain Python."""

from __future__ import annotations

import json
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import tritonclient.grpc as grpc
import tritonclient.http as http
from pagetide.contract.fields import tensor_fields
from triton_server import ROOT, TritonServer, free_address
from tritonclient.utils import np_to_triton_dtype

# Every input of the contract, and those that only one face or step has.
DTYPES = {name: field.dtype for name, field in tensor_fields()} | {
    "QUERY": "BYTES",
    "return_cumulative_logprob": "BOOL",
    "streaming": "BOOL",
    "runtime_top_p": "FP32",
    "len_penalty": "FP32",
}
NUMPY = {
    "BYTES": np.object_,
    "FP32": np.float32,
    "FP16": np.float16,
    "UINT64": np.uint64,
    "BOOL": np.bool_,
    "INT32": np.int32,
}

# Converted weights, shared by all servers of the tests.
CACHE = str(ROOT / ".cache")


def start(settings: dict) -> TritonServer:
    """A server of its own, which checks its block accounting after every step."""
    server = TritonServer(free_address(), {"cache_dir": CACHE, "check_integrity": True, **settings})
    server.start()
    server.wait_until_ready()
    return server


def inputs(module: Any, values: dict[str, Any]) -> list[Any]:
    """Input tensors of one prompt; a list becomes one row, a list of lists several prompts, an array is
    sent as it is.
    """
    tensors = []
    for name, value in values.items():
        kind = DTYPES.get(name, "INT32")
        if isinstance(value, np.ndarray):
            tensor = module.InferInput(name, list(value.shape), np_to_triton_dtype(value.dtype))
            tensor.set_data_from_numpy(value)
            tensors.append(tensor)
            continue
        rows = (
            value
            if isinstance(value, list) and value and isinstance(value[0], list)
            else [value if isinstance(value, list) else [value]]
        )
        if kind == "BYTES":
            rows = [[item.encode() if isinstance(item, str) else item for item in row] for row in rows]
        array = np.array(rows, dtype=NUMPY[kind])
        tensor = module.InferInput(name, list(array.shape), kind)
        tensor.set_data_from_numpy(array)
        tensors.append(tensor)
    return tensors


@dataclass
class Stream:
    """All responses to one request, in order, and its error if there was one."""

    responses: list[dict[str, Any]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    results: list[Any] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)

    @property
    def text(self) -> str:
        return "".join(response["text_output"] for response in self.responses)

    def ids(self, index: int = 0) -> list[int]:
        return [i for r in self.responses if r["sequence_index"] == index for i in r["output_ids"]]

    @property
    def reason(self) -> str:
        return self.responses[-1]["finish_reason"]


def as_dict(result: Any) -> dict[str, Any]:
    """One response's outputs: texts decoded (strictly), single numbers as numbers, ids as a list."""
    found: dict[str, Any] = {}
    for output in result.get_response().outputs:
        array = result.as_numpy(output.name)
        if not array.size:
            found[output.name] = []
        elif output.name == "output_ids":
            found[output.name] = array.reshape(-1).tolist()
        elif array.dtype == np.object_:
            found[output.name] = array.reshape(-1)[0].decode("utf-8", "strict")
        else:
            found[output.name] = array.reshape(-1)[0].item()
    return found


class Streams:
    """A gRPC stream that many requests share.

    An error is told to its request only if that is alone on the stream.
    """

    unclosed: ClassVar[set[Streams]] = (
        set()
    )  # what a failed test has left open would keep its server from stopping

    def __init__(self, server: TritonServer):
        self.client = grpc.InferenceServerClient(server.address.grpc)
        self._open: dict[str, Stream] = {}
        self.errors: list[str] = []
        self.client.start_stream(self._receive)
        self.unclosed.add(self)

    def _receive(self, result: Any, error: Any) -> None:
        now = time.monotonic()
        if error is not None:
            # Triton does not say which request of the connection an error belongs to.
            self.errors.append(error.message())
            if len(self._open) == 1:
                (stream,) = self._open.values()
                stream.errors.append(error.message())
                stream.done.set()
            return
        response = result.get_response()
        stream = self._open[response.id]
        if response.outputs:
            stream.responses.append(as_dict(result))
            stream.results.append(result)
            stream.times.append(now)
        if response.parameters["triton_final_response"].bool_param:
            stream.done.set()

    def send(
        self,
        model: str,
        request_id: str,
        parameters: dict[str, Any] | None = None,
        timeout_us: int | None = None,
        outputs: list[str] | None = None,
        **values: Any,
    ) -> Stream:
        """timeout_us: Triton's own timeout of the request; outputs: which are asked for, None: all."""
        self._open[request_id] = stream = Stream()
        asked = None if outputs is None else [grpc.InferRequestedOutput(name) for name in outputs]
        self.client.async_stream_infer(
            model,
            inputs(grpc, values),
            outputs=asked,
            request_id=request_id,
            parameters=parameters,
            timeout=timeout_us,
        )
        return stream

    def close(self, cancel: bool = False) -> None:
        self.unclosed.discard(self)
        self.client.stop_stream(cancel_requests=cancel)
        self.client.close()


def stream_one(
    server: TritonServer,
    model: str = "ensemble",
    parameters: dict[str, Any] | None = None,
    timeout: float = 120,
    **values: Any,
) -> Stream:
    """One request on a stream of its own."""
    streams = Streams(server)
    try:
        stream = streams.send(model, "one", parameters, **values)
        assert stream.done.wait(timeout), "no answer in time"
        return stream
    finally:
        streams.close()


def generate(
    server: TritonServer, body: dict[str, Any], model: str = "ensemble", timeout: float = 120
) -> tuple[int, dict[str, Any]]:
    """HTTP generate: status and JSON."""
    request = urllib.request.Request(
        f"http://{server.address.http}/v2/models/{model}/generate", json.dumps(body).encode()
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def infer_http(
    server: TritonServer, model: str, parameters: dict[str, Any] | None = None, **values: Any
) -> Any:
    with http.InferenceServerClient(server.address.http, network_timeout=120) as client:
        return client.infer(model, inputs(http, values), parameters=parameters)


def metric(server: TritonServer, name: str) -> float:
    """The value of a metric of ours."""
    with urllib.request.urlopen(f"http://{server.address.metrics}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return float(re.search(rf"^{name}{{.*}} (\S+)$", text, re.MULTILINE)[1])


def wait_for(condition: Callable[[], bool], timeout: float = 60, what: str = "") -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout} s: {what}"
        time.sleep(0.05)


def wait_until_idle(server: TritonServer) -> None:
    """No sequence, no block in use."""
    names = ("pagetide_requests_running", "pagetide_requests_waiting", "pagetide_kv_blocks_used")
    wait_for(lambda: all(metric(server, name) == 0 for name in names), what="an idle engine")


__all__ = [
    "Stream",
    "Streams",
    "generate",
    "infer_http",
    "metric",
    "start",
    "stream_one",
    "wait_for",
    "wait_until_idle",
]
