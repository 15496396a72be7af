"""What Locust tells people is what the server has measured."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest
from client import metric, wait_for, wait_until_idle
from gateway import Gateway
from load_test import knee
from load_user import Answer, make_user
from triton_server import ROOT

HISTOGRAM_OF = {
    "time to first token": "pagetide_time_to_first_token_seconds",
    "gap between chunks": "pagetide_chunk_gap_seconds",
    "time per output token": "pagetide_time_per_output_token_seconds",
    "answer": "pagetide_request_seconds",
}


@pytest.fixture
def gateway(real) -> Iterator[Gateway]:
    found = Gateway(real)
    yield found
    found.stop()


def test_locust_has_openai_users_too(real, gateway):
    command = [
        *(sys.executable, "-m", "locust", "-f", "clients/locustfile.py", "--headless", "--json"),
        *("--users=3", "--spawn-rate=3", "--run-time=2s", "--stop-timeout=100", f"--host={gateway.url}"),
    ]
    before = metric(real, "pagetide_generated_tokens")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = {entry["name"]: entry for entry in json.loads(done.stdout)}
    assert found["answer"]["num_requests"] >= 3 and not found["answer"]["num_failures"]
    assert found["answer"]["method"] == "OpenAI"
    tokens = found["answer"]["total_content_length"]
    wait_for(lambda: metric(real, "pagetide_generated_tokens") - before >= tokens)


def test_a_sweep_finds_figures_for_both_ways_in_and_goes_on_where_it_was_stopped(real, gateway, tmp_path):
    out = tmp_path / "sweep.json"
    command = [sys.executable, "scripts/load_test.py", real.address.grpc, gateway.url, "--out", str(out)]
    command += ["--seconds", "3", "--rates", "1", "3"]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert first.returncode == 0, first.stderr
    points = json.loads(out.read_text())
    assert [(point["url"], point["rate"]) for point in points] == [
        (url, rate) for url in (real.address.grpc, gateway.url) for rate in (1, 3)
    ]
    for point in points:
        assert point["sent"] > 0 and not point["failed"] and point["tokens_s"] > 0
        assert 0 < point["ttft_p50"] <= point["ttft_p99"] and 0 < point["tpot_p50"] <= point["tpot_p99"]
    assert out.with_suffix(".png").stat().st_size > 10_000 and "the knee" in first.stdout
    out.write_text(json.dumps(points[:3]))  # as if it had been stopped
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0 and json.loads(out.read_text())[:3] == points[:3]
    assert "1/s" not in again.stderr and "3/s" in again.stderr, "what is known is not measured again"


def test_a_server_that_is_not_there_is_said(tmp_path):
    answers: list[Answer] = []
    user = make_user("http://127.0.0.1:1", answers.append)
    user.send("a", 1)
    wait_for(lambda: answers)
    assert "refused" in answers[0].error
    user.close()


def test_the_knee_is_the_last_rate_that_the_server_keeps_up_with():
    def point(rate: float, finished: float, first: float) -> dict[str, float]:
        return {"rate": rate, "finished_s": finished, "ttft_p99": first, "failed": 0}

    points = [
        point(4, 3.9, 300),
        point(1, 1, 100),
        point(8, 7.8, 900),
        point(2, 1.9, 120),
        point(16, 9, 5000),
    ]
    assert knee(points)["rate"] == 4
    assert knee([point(1, 0.2, 100)]) is None


def test_locust_agrees_with_the_servers_histograms(real):
    """Prompts are long and answers too, so that the way between server and client is a small part of each
    time on any machine.
    """
    wait_until_idle(real)

    def histograms() -> dict[str, tuple[float, float]]:
        return {
            name: (metric(real, f"{its}_count"), metric(real, f"{its}_sum"))
            for name, its in HISTOGRAM_OF.items()
        }

    before = histograms()
    command = [
        sys.executable,
        "-m",
        "locust",
        "-f",
        "clients/locustfile.py",
        "--headless",
        "--users=12",
        "--spawn-rate=12",
        "--run-time=5s",
    ]
    command += [
        "--stop-timeout=300",
        "--json",
        "--min-words=200",
        "--max-words=300",
        f"--host={real.address.grpc}",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = {entry["name"]: entry for entry in json.loads(done.stdout)}
    wait_until_idle(real)
    wait_for(
        lambda: (
            histograms()["gap between chunks"][0] - before["gap between chunks"][0]
            == found["gap between chunks"]["num_requests"]
        )
    )
    for name, (count, seconds) in histograms().items():
        count, seconds = count - before[name][0], seconds - before[name][1]
        assert found[name]["num_requests"] == count >= 12, name
        assert abs(found[name]["total_response_time"] / 1000 - seconds) <= 0.1 * seconds, name
    chunks = found["chunks per answer"]
    assert (
        chunks["total_response_time"] == found["gap between chunks"]["num_requests"] + chunks["num_requests"]
    )
