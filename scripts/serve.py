"""Starts Pagetide on Triton, streams one completion, tells how to send requests, and serves until Ctrl-C.

Run by serve.sh.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from math import ceil
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "backend_src"))

from gateway_process import gateway_of, start_gateway
from pagetide.config import SettingsError
from processes import ServerError, check_port
from rich.console import Console
from rich.panel import Panel
from rich.text import Text
from settings_options import add_settings, settings_of
from triton_server import DRAIN_S, ROOT, Address, ModelControl, TritonServer, find_running

console = Console(highlight=False, soft_wrap=True)
MIN_LIFE_S = 60  # a server that lived shorter would only end again
QUESTION = "What is the capital of France? Explain in two sentences."

CURL = """curl -sN http://{http}/v2/models/ensemble/generate_stream \\
  -d '{{"text_input": "The tide rises because", "max_tokens": 40, "temperature": 0, "stream": true}}'"""

PYTHON = """.venv/bin/python clients/grpc_stream.py --url {grpc} "Why does the tide rise?\""""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="serve.sh", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all")
    parser.add_argument("--http-port", type=int, default=8000)
    parser.add_argument("--grpc-port", type=int, default=8001)
    parser.add_argument("--metrics-port", type=int, default=8002)
    parser.add_argument("--gateway-port", type=int, default=9000, help="port of the OpenAI API")
    parser.add_argument(
        "--triton-traces",
        action="store_true",
        help="Triton's own spans too, one for each step and chunk, at --otlp-traces-endpoint",
    )
    parser.add_argument("--no-gateway", action="store_true", help="leave the OpenAI API out")
    parser.add_argument(
        "--detach", action="store_true", help="return once the server is ready; scripts/stop.sh ends it"
    )
    parser.add_argument(
        "--drain-s",
        type=float,
        default=DRAIN_S,
        help="seconds that answers under way may take when the server is told to stop",
    )
    parser.add_argument(
        "--torch-index",
        metavar="URL",
        help="package index for torch at set-up, for example one with CPU builds",
    )
    parser.add_argument(
        "--model-control",
        action="store_true",
        help="models can be loaded and unloaded by Triton's repository API; with ADMIN_TOKEN in the "
        "environment only by who knows it",
    )
    add_settings(parser)
    return parser.parse_args()


def wait_with_progress(server: TritonServer) -> None:
    """Shows what the server is doing until it is ready."""
    begin = time.monotonic()
    waiting = threading.Thread(target=lambda: _wait(server, failures), daemon=True)
    failures: list[ServerError] = []
    waiting.start()
    said = ""
    with console.status("starting Triton") as status:
        while waiting.is_alive():
            waiting.join(0.2)
            stage = _stage(server)
            status.update(f"{stage} ({time.monotonic() - begin:.0f} s)")
            if stage != said and not console.is_terminal:
                console.print(stage)
            said = stage
    if failures:
        raise failures[0]
    console.print(f"ready in {time.monotonic() - begin:.1f} s")


def _wait(server: TritonServer, failures: list[ServerError]) -> None:
    try:
        server.wait_until_ready()
    except ServerError as error:
        failures.append(error)


def _stage(server: TritonServer) -> str:
    log = server.log.read_text(errors="replace") if server.log.exists() else ""
    if "pagetide.engine: ready" in log:
        return "starting Triton's front ends"
    if "loading: llm" in log:
        return "loading the model (the first start converts it and compiles kernels: about a minute)"
    return "starting Triton"


def show_one_completion(address: Address) -> None:
    """Streams a real answer to the terminal."""
    sys.path.insert(0, str(ROOT / "clients"))
    from grpc_stream import stream_chat
    from tritonclient.utils import InferenceServerException

    console.print(Text(f"> {QUESTION}", style="bold"))
    begin, first = time.monotonic(), None
    try:
        for text in stream_chat(address.grpc, QUESTION, max_tokens=64, temperature=0.0):
            first = first or time.monotonic() - begin
            console.print(text, end="", markup=False)
        console.print(f"\n(first text after {1000 * (first or 0):.0f} ms)", style="dim")
    except InferenceServerException as error:
        console.print(f"(no chat: {error.message()})", style="dim")


def serve_until_stopped(server: TritonServer, drain_s: float, run_gateway: Callable[[], None] | None) -> int:
    """run_gateway: starts it again when it has ended; none: there is none."""
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    begin, is_ready = time.monotonic(), True
    while not stopped.wait(0.5):
        if not server.is_alive():
            if server.is_stopping:
                console.print("stopped")
                return 0
            if not is_ready or time.monotonic() - begin < MIN_LIFE_S:
                console.print(f"Triton ended by itself; its log: {server.log}", style="red")
                return 1
            console.print(
                f"Triton ended by itself, and is started again; its log: {server.log}.1", style="red"
            )
            server.start_again()
            is_ready = False
        elif not is_ready and server.is_ready():
            console.print("ready again")
            begin, is_ready = time.monotonic(), True
        if run_gateway is not None and gateway_of(server.folder) is None:
            console.print("the gateway ended by itself, and is started again", style="red")
            try:
                run_gateway()
            except ServerError as error:
                console.print(str(error), style="red", markup=False)
                run_gateway = None
    console.print("stopping")
    is_clean = server.stop(drain_s)
    console.print("stopped" if is_clean else "stopped; some processes had to be killed")
    return 0


def main() -> int:
    arguments = parse_arguments()
    address = Address(arguments.host, arguments.http_port, arguments.grpc_port, arguments.metrics_port)
    try:
        settings = settings_of(arguments)
        if find_running(address.http_port):
            raise ServerError(
                f"a server started here already listens on port {address.http_port}; scripts/stop.sh ends it"
            )
        if not arguments.no_gateway:
            check_port(address.host, arguments.gateway_port)
        control = ModelControl(os.environ.get("ADMIN_TOKEN", ""), arguments.model_control)
        if control.is_explicit and not control.token and not address.is_local:
            raise ServerError(
                "--model-control lets whoever reaches the ports run code of their own as a model: set "
                "ADMIN_TOKEN in the environment, or listen on 127.0.0.1 only"
            )
        traces = settings.get("otlp_traces_endpoint", "")
        if arguments.triton_traces and not traces:
            raise ServerError("--triton-traces needs --otlp-traces-endpoint, the collector's URL")
        server = TritonServer(
            address, settings, control=control, traces=traces if arguments.triton_traces else ""
        )
        options = ["--otlp-traces-endpoint", traces, "--drain-s", str(ceil(arguments.drain_s))]
        if adapters := settings["lora_dir"]:
            options += ["--lora-dir", adapters]
        gateway = (
            None
            if arguments.no_gateway
            else partial(
                start_gateway,
                server.folder,
                address,
                arguments.gateway_port,
                ends_with_parent=not arguments.detach,
                options=options,
            )
        )
        server.start(ends_with_parent=not arguments.detach)
        try:
            wait_with_progress(server)
            if gateway is not None:
                gateway()
        except KeyboardInterrupt:
            server.stop()
            return 130
        except ServerError:
            server.stop()
            raise
    except (ServerError, SettingsError) as error:
        console.print(str(error), style="red", markup=False)
        return 1
    show_one_completion(address)
    commands = f"{CURL.format(http=address.http)}\n\n{PYTHON.format(grpc=address.grpc)}"
    console.print(
        Panel(Text(commands), title="send requests", expand=False) if console.is_terminal else commands,
        markup=False,
    )
    if not arguments.no_gateway:
        base = f"http://{address.reachable_host}:{arguments.gateway_port}"
        console.print(
            f'OpenAI clients: OpenAI(base_url="{base}/v1", api_key="none"), model "ensemble"', markup=False
        )
        console.print(f"to try it in a browser: {base}", markup=False)
    if arguments.detach:
        console.print(
            f"serving on http://{address.http}, gRPC {address.grpc}, metrics "
            f"http://{address.metrics}/metrics; scripts/stop.sh ends it"
        )
        return 0
    console.print(
        f"serving on http://{address.http}, gRPC {address.grpc}, metrics "
        f"http://{address.metrics}/metrics; Ctrl-C ends it"
    )
    return serve_until_stopped(server, arguments.drain_s, gateway)


if __name__ == "__main__":
    sys.exit(main())
