"""Starts the gateway: python -m pagetide.gateway --triton 127.0.0.1:8001 --port 9000"""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path

import uvicorn

from pagetide.gateway.app import make_app
from pagetide.gateway.calls import FORMATS
from pagetide.gateway.door import Rules


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pagetide.gateway",
        description="The OpenAI API over one or several Tritons.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all")
    parser.add_argument("--port", type=int, default=9000)
    parser.add_argument(
        "--triton", default="127.0.0.1:8001", help="Triton's gRPC address, or several with commas"
    )
    parser.add_argument(
        "--metrics", default="", help="Triton's metrics address, or several with commas, for the playground"
    )
    parser.add_argument(
        "--api-keys-file", type=Path, help="file with one key a line; also PAGETIDE_API_KEYS, with commas"
    )
    parser.add_argument("--max-body-mb", type=float, default=16.0, help="larger bodies are refused")
    parser.add_argument("--cors-origin", action="append", default=[], help="page that may call; * for all")
    parser.add_argument(
        "--tool-call-format", choices=FORMATS, help="how the model writes calls; by its template otherwise"
    )
    return parser.parse_args()


def keys_of(file: Path | None) -> tuple[str, ...]:
    """All keys of the file and of the environment. Raises OSError."""
    lines = file.read_text().splitlines() if file else []
    lines += os.environ.get("PAGETIDE_API_KEYS", "").split(",")
    return tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))


def _addresses(listed: str) -> list[str]:
    return [address.strip() for address in listed.split(",") if address.strip()]


def main() -> None:
    arguments = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    rules = Rules(
        keys_of(arguments.api_keys_file), int(arguments.max_body_mb * 2**20), tuple(arguments.cors_origin)
    )
    metrics = _addresses(arguments.metrics)
    app = make_app(_addresses(arguments.triton), rules, arguments.tool_call_format or "", metrics)
    uvicorn.run(app, host=arguments.host, port=arguments.port, log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
