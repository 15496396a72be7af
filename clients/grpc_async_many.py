"""Many prompts at once over one asyncio gRPC connection; each answer is printed when it is whole.

python clients/grpc_async_many.py [--url 127.0.0.1:8001] [--count 16] [--max-tokens 40]
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import tritonclient.grpc.aio as grpc
from grpc_stream import tensor

SUBJECTS = ["tides", "lighthouses", "sea glass", "whales", "harbours", "storms", "ferries", "salt"]


async def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="127.0.0.1:8001")
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=40)
    arguments = parser.parse_args()
    prompts = [f"A short note on {SUBJECTS[i % len(SUBJECTS)]}, number {i}:" for i in range(arguments.count)]

    async def requests() -> AsyncIterator[dict[str, Any]]:
        for number, prompt in enumerate(prompts):
            inputs = [
                tensor("text_input", prompt),
                tensor("max_tokens", arguments.max_tokens),
                tensor("stream", True),
            ]
            yield {"model_name": "ensemble", "inputs": inputs, "request_id": str(number)}

    answers, num_done, begin = [""] * len(prompts), 0, time.monotonic()
    async with grpc.InferenceServerClient(arguments.url) as client:
        async for result, error in client.stream_infer(requests()):
            if error is not None:
                raise error
            number = int(result.get_response().id)
            answers[number] += result.as_numpy("text_output")[0].decode()
            if result.as_numpy("finish_reason")[0]:
                num_done += 1
                print(f"[{number}] {' '.join(answers[number].split())}")
            if num_done == len(prompts):
                break
    print(f"{num_done} answers in {time.monotonic() - begin:.1f} s")


if __name__ == "__main__":
    asyncio.run(main())
