"""Starts the gateway: python -m pagetide.gateway --triton 127.0.0.1:8001 --port 9000"""

from __future__ import annotations

import argparse
import logging
import os
import socket
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
    parser.add_argument(
        "--max-stall-s", type=float, default=60.0, help="a client that reads nothing for so long has left"
    )
    parser.add_argument(
        "--drain-s", type=int, default=30, help="seconds that answers under way may take at the end"
    )
    parser.add_argument("--cors-origin", action="append", default=[], help="page that may call; * for all")
    parser.add_argument(
        "--tool-call-format", choices=FORMATS, help="how the model writes calls; by its template otherwise"
    )
    parser.add_argument(
        "--lora-dir", type=Path, help="Triton's folder of LoRA adapters, whose names then are models too"
    )
    parser.add_argument(
        "--otlp-traces-endpoint",
        default="",
        help="an OpenTelemetry collector's URL for traces (OTLP over HTTP)",
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
        keys=keys_of(arguments.api_keys_file),
        max_body_bytes=int(arguments.max_body_mb * 2**20),
        origins=tuple(arguments.cors_origin),
        max_stall_s=arguments.max_stall_s,
    )
    metrics = _addresses(arguments.metrics)
    tritons, token = _addresses(arguments.triton), os.environ.get("ADMIN_TOKEN", "")
    lora_dir = arguments.lora_dir and arguments.lora_dir.expanduser()
    call_format, traces = arguments.tool_call_format or "", arguments.otlp_traces_endpoint
    app = make_app(tritons, rules, call_format, metrics, token, traces, lora_dir)
    config = uvicorn.Config(
        app,
        host=arguments.host,
        port=arguments.port,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=arguments.drain_s,
    )
    listening = config.bind_socket()
    # The kernel, too, gives up on who reads nothing: what is left to send would keep the connection for ever.
    stall_ms = max(1, int(1000 * arguments.max_stall_s))
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, stall_ms)
    uvicorn.Server(config).run(sockets=[listening])


if __name__ == "__main__":
    main()
