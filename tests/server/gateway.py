"""A gateway of a test's own, and what is asked of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from typing import Any

import openai
from client import wait_for
from triton_server import ROOT, TritonServer, free_address


class Gateway:
    def __init__(self, server: TritonServer, *options: str, triton: str = "", admin_token: str = ""):
        self.port = free_address().http_port
        self.url = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-m", "pagetide.gateway", "--triton", triton or server.address.grpc]
        command += ["--port", str(self.port), *options]
        environment = {**os.environ, "ADMIN_TOKEN": admin_token}
        self.process = subprocess.Popen(command, cwd=ROOT / "backend_src", env=environment)
        try:
            wait_for(lambda: self.status("/health") == 200, what="a healthy gateway")
        except BaseException:
            self.stop()
            raise

    def status(self, path: str) -> int:
        return self.ask(path)[0]

    def ask(self, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any]:
        """Status and JSON. body: JSON, or bytes as they are."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data, {"Content-Type": "application/json", **(headers or {})}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())
        except OSError:
            return 0, None

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)

    def stop(self) -> None:
        self.process.terminate()
        assert self.process.wait(20) in (0, -15)
