"""Prometheus and Grafana ask for what a real server tells: every query of the dashboard and of the alerts."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from client import Streams, generate, wait_for
from gateway import Gateway
from make_dashboard import queries
from processes import answers
from triton_server import ROOT, free_address

PROMETHEUS = ROOT / "docker" / "prometheus"


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"]
    return group["rules"]


def asked() -> list[str]:
    """All queries, without the bounds of the alerts and what only a machine with a GPU tells."""
    alerts = [re.sub(r" (==|>) [\d.]+$", "", rule["expr"]) for rule in rules()]
    return [query for query in (*queries(), *alerts) if not query.startswith("nv_gpu")]


@pytest.fixture(scope="module")
def gateway(real) -> Iterator[Gateway]:
    gateway = Gateway(real)
    yield gateway
    gateway.stop()


def use(server: Any, gateway: Gateway) -> None:
    """Something for every metric."""
    streams = Streams(server)
    sent = streams.send("ensemble", "m", text_input="The sea " * 20, max_tokens=8, stream=True)
    assert sent.done.wait(120)
    streams.close()
    assert generate(server, {"text_input": "The sea " * 20, "max_tokens": 4})[0] == 200
    urllib.request.urlopen(f"{gateway.url}/v1/models", timeout=60).close()


def test_every_metric_that_is_asked_for_is_told(real, gateway):
    use(real, gateway)
    told = ""
    for url in (f"http://{real.address.metrics}/metrics", f"{gateway.url}/metrics"):
        told += urllib.request.urlopen(url, timeout=30).read().decode()
    names = {name for query in asked() for name in re.findall(r"\bpagetide_\w+", query)}
    assert len(names) > 20
    assert [name for name in sorted(names) if not re.search(rf"^{name}[ {{]", told, re.MULTILINE)] == []


def test_kubernetes_finds_what_it_asks_of_a_model_server(real):
    """The Gateway API Inference Extension's model server protocol, by the names that it takes from vLLM."""
    told = urllib.request.urlopen(f"http://{real.address.metrics}/metrics", timeout=30).read().decode()
    for name in ("num_requests_waiting", "num_requests_running", "kv_cache_usage_perc"):
        (value,) = re.findall(rf"^vllm:{name}{{.*}} (\S+)$", told, re.MULTILINE)
        assert float(value) >= 0


@pytest.mark.skipif(not shutil.which("prometheus"), reason="Prometheus is not installed")
def test_prometheus_finds_data_for_every_query(real, gateway, tmp_path):
    port = free_address().http_port
    with running_prometheus(real, gateway, tmp_path, port) as base:
        wait_for(lambda: ask(base, "up") and all(v == "1" for v in values(ask(base, "up"))), 60, "targets")
        missing = asked()

        def are_answered() -> bool:
            use(real, gateway)
            missing[:] = [query for query in missing if not ask(base, as_sent(query))]
            return not missing

        wait_for(are_answered, 120, f"data for {missing}")
        found = json.loads(urllib.request.urlopen(f"{base}/api/v1/rules", timeout=30).read())
        (group,) = found["data"]["groups"]
        assert [rule["health"] for rule in group["rules"]] == ["ok"] * len(rules())


@contextlib.contextmanager
def running_prometheus(server: Any, gateway: Gateway, folder: Path, port: int) -> Iterator[str]:
    """With the repository's own files, but the tests' addresses and a scrape each second."""
    text = re.sub(r"_interval: \d+s", "_interval: 1s", (PROMETHEUS / "prometheus.yml").read_text())
    config = yaml.safe_load(text)
    addresses = {"triton": server.address.metrics, "gateway": gateway.url.removeprefix("http://")}
    for job in config["scrape_configs"]:
        del job["static_configs" if job["job_name"] == "gateway" else "dns_sd_configs"]
        job["static_configs"] = [{"targets": [addresses[job["job_name"]]]}]
    file, base = folder / "prometheus.yml", f"http://127.0.0.1:{port}"
    file.write_text(yaml.safe_dump(config))
    shutil.copy(PROMETHEUS / "alerts.yml", folder)
    subprocess.run(["promtool", "check", "config", str(file)], check=True)
    options = [f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address=127.0.0.1:{port}"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            ["prometheus", f"--config.file={file}", *options], stdout=log, stderr=subprocess.STDOUT
        )
    try:
        wait_for(lambda: answers(f"{base}/-/ready"), 60, "Prometheus")
        yield base
    finally:
        process.terminate()
        process.wait(30)


def as_sent(query: str) -> str:
    """As Grafana does with its variables."""
    return query.replace("$model", ".*").replace("$__rate_interval", "30s")


def ask(base: str, query: str) -> list[Any]:
    url = f"{base}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
    with urllib.request.urlopen(url, timeout=30) as answer:
        found = json.loads(answer.read())["data"]["result"]
    return [one for one in found if one["value"][1] != "NaN"]


def values(found: list[Any]) -> list[str]:
    return [one["value"][1] for one in found]
