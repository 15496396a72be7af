"""Streams an answer over HTTP as server-sent events; needs nothing but Python.

python clients/http_stream.py "The tide rises because" [--url 127.0.0.1:8000] [--max-tokens 50]
[--temperature 0.7]
"""

from __future__ import annotations

import argparse
import json
import urllib.request


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prompt")
    parser.add_argument("--url", default="127.0.0.1:8000")
    parser.add_argument("--max-tokens", type=int, default=50)
    parser.add_argument("--temperature", type=float, default=0.7)
    arguments = parser.parse_args()

    body = {
        "text_input": arguments.prompt,
        "max_tokens": arguments.max_tokens,
        "temperature": arguments.temperature,
        "stream": True,
    }
    request = urllib.request.Request(
        f"http://{arguments.url}/v2/models/ensemble/generate_stream", json.dumps(body).encode()
    )
    with urllib.request.urlopen(request) as events:
        for line in events:
            if line.startswith(b"data: "):
                event = json.loads(line.removeprefix(b"data: "))
                if "error" in event:
                    raise SystemExit(event["error"])
                print(event["text_output"], end="", flush=True)
    print()


if __name__ == "__main__":
    main()
