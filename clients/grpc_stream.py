"""Streams an answer over gRPC.

python clients/grpc_stream.py "Why does the tide rise?" [--url 127.0.0.1:8001] [--max-tokens 200]
[--temperature 0.7]
"""

from __future__ import annotations

import argparse
import json
import queue
from collections.abc import Iterator

import numpy as np
import tritonclient.grpc as grpc


def tensor(name: str, value: str | int | float | bool) -> grpc.InferInput:
    """One value as an input of shape [1, 1]: one prompt, one value."""
    if isinstance(value, str):
        array, kind = np.array([[value.encode()]], dtype=np.object_), "BYTES"
    elif isinstance(value, bool):
        array, kind = np.array([[value]]), "BOOL"
    elif isinstance(value, int):
        array, kind = np.array([[value]], dtype=np.int32), "INT32"
    else:
        array, kind = np.array([[value]], dtype=np.float32), "FP32"
    result = grpc.InferInput(name, array.shape, kind)
    result.set_data_from_numpy(array)
    return result


def stream_chat(url: str, message: str, max_tokens: int, temperature: float) -> Iterator[str]:
    """Yields the pieces of the answer as they come. Raises InferenceServerException."""
    responses: queue.Queue = queue.Queue()
    inputs = [
        tensor("messages", json.dumps([{"role": "user", "content": message}])),
        tensor("max_tokens", max_tokens),
        tensor("temperature", temperature),
        tensor("stream", True),
    ]
    with grpc.InferenceServerClient(url) as client:
        client.start_stream(lambda result, error: responses.put(error or result))
        client.async_stream_infer("ensemble", inputs)
        while True:
            response = responses.get()
            if isinstance(response, Exception):
                raise response
            yield response.as_numpy("text_output")[0].decode()
            if response.as_numpy("finish_reason")[0]:
                return


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("message")
    parser.add_argument("--url", default="127.0.0.1:8001")
    parser.add_argument("--max-tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.7)
    arguments = parser.parse_args()
    for text in stream_chat(arguments.url, arguments.message, arguments.max_tokens, arguments.temperature):
        print(text, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
