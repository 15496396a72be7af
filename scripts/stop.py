"""Stops servers that serve.sh --detach has started: the one with --http-port, or all. Run by stop.sh."""

from __future__ import annotations

import argparse
import sys

from triton_server import DRAIN_S, RUN, find_running


def main() -> int:
    parser = argparse.ArgumentParser(prog="stop.sh", description=__doc__)
    parser.add_argument("--http-port", type=int, help="only the server with this HTTP port")
    parser.add_argument(
        "--drain-s", type=float, default=DRAIN_S, help="seconds that answers under way may take"
    )
    arguments = parser.parse_args()
    ports = (
        [arguments.http_port]
        if arguments.http_port
        else sorted(int(f.name) for f in RUN.glob("*") if f.name.isdigit())
    )
    servers = [server for port in ports if (server := find_running(port))]
    for server in servers:
        is_clean = server.stop(arguments.drain_s)
        print(
            f"stopped the server on port {server.address.http_port}"
            + ("" if is_clean else "; some processes had to be killed")
        )
    if not servers:
        print("no server of this folder is running")
    return 0


if __name__ == "__main__":
    sys.exit(main())
