"""A chat in the terminal. An empty line or Ctrl-D ends it.

python clients/chat.py [--url 127.0.0.1:8001] [--system "You are a poet."] [--temperature 0.7]
"""

from __future__ import annotations

import argparse
import json
import queue
from collections.abc import Iterator

import tritonclient.grpc as grpc
from grpc_stream import tensor


def answer(
    client: grpc.InferenceServerClient,
    responses: queue.Queue,
    messages: list[dict[str, str]],
    options: argparse.Namespace,
) -> Iterator[str]:
    """Sends the whole conversation; yields the pieces of the next message."""
    inputs = [
        tensor("messages", json.dumps(messages)),
        tensor("max_tokens", options.max_tokens),
        tensor("temperature", options.temperature),
        tensor("stream", True),
    ]
    client.async_stream_infer("ensemble", inputs)
    while True:
        response = responses.get()
        if isinstance(response, Exception):
            raise SystemExit(str(response))
        yield response.as_numpy("text_output")[0].decode()
        if response.as_numpy("finish_reason")[0]:
            return


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="127.0.0.1:8001")
    parser.add_argument("--system", help="instructions that stand before the conversation")
    parser.add_argument("--max-tokens", type=int, default=300)
    parser.add_argument("--temperature", type=float, default=0.7)
    options = parser.parse_args()

    messages = [{"role": "system", "content": options.system}] if options.system else []
    responses: queue.Queue = queue.Queue()
    with grpc.InferenceServerClient(options.url) as client:
        client.start_stream(lambda result, error: responses.put(error or result))
        while True:
            try:
                said = input("you> ").strip()
            except (EOFError, KeyboardInterrupt):
                said = ""
            if not said:
                break
            messages.append({"role": "user", "content": said})
            text = ""
            for piece in answer(client, responses, messages, options):
                print(piece, end="", flush=True)
                text += piece
            print()
            messages.append({"role": "assistant", "content": text})


if __name__ == "__main__":
    main()
