"""What Locust tells people is what the server has measured."""

from __future__ import annotations

import json
import subprocess
import sys

from client import metric, wait_for, wait_until_idle
from triton_server import ROOT

HISTOGRAM_OF = {
    "time to first token": "pagetide_time_to_first_token_seconds",
    "gap between chunks": "pagetide_chunk_gap_seconds",
    "time per output token": "pagetide_time_per_output_token_seconds",
    "answer": "pagetide_request_seconds",
}


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
