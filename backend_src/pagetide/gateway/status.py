"""What the engines do now, read from the metrics of the Tritons."""

from __future__ import annotations

import asyncio
import http.client
import time
import urllib.request
from collections.abc import Iterable, Iterator

from prometheus_client.parser import text_string_to_metric_families

from pagetide.gateway.errors import ApiError

_TIMEOUT_S, _KEPT_S = 2.0, 0.5
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy is between
# What is shown, and the sample that says it; over several Tritons, sums.
SAMPLES = {
    "running": "pagetide_requests_running",
    "waiting": "pagetide_requests_waiting",
    "blocks_used": "pagetide_kv_blocks_used",
    "blocks_cached": "pagetide_kv_blocks_cached",
    "blocks_total": "pagetide_kv_blocks_total",
    "generated_tokens": "pagetide_generated_tokens",
    "steps": "pagetide_step_sequences_count",
    "step_sequences": "pagetide_step_sequences_sum",
}


class Status:
    """However many ask, Triton is read twice a second at most. addresses: host:port of each one's metrics."""

    def __init__(self, addresses: Iterable[str]):
        self._addresses = list(addresses)
        self._reading: asyncio.Future[dict[str, float]] | None = None
        self._read_at = 0.0

    async def now(self) -> dict[str, float]:
        """Gauges and counts by the names of SAMPLES. Raises ApiError."""
        if not self._addresses:
            raise ApiError(404, "the gateway was started without --metrics, Triton's metrics address")
        is_old = time.monotonic() - self._read_at > _KEPT_S
        if self._reading is None or (self._reading.done() and is_old):
            self._read_at = time.monotonic()
            self._reading = asyncio.ensure_future(asyncio.to_thread(self._read_all))
        return await asyncio.shield(self._reading)

    def _read_all(self) -> dict[str, float]:
        try:
            return summed([read_metrics(address) for address in self._addresses])
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ApiError(503, f"Triton's metrics cannot be read: {error}") from None


def read_metrics(address: str) -> str:
    """What Triton's metrics say at host:port. Raises OSError, HTTPException."""
    with _OPENER.open(f"http://{address}/metrics", timeout=_TIMEOUT_S) as answer:
        return answer.read().decode()


def summed(texts: Iterable[str]) -> dict[str, float]:
    """The samples of some Prometheus texts; 0 for those that none of them has."""
    values = dict.fromkeys(SAMPLES, 0.0)
    named = {sample: name for name, sample in SAMPLES.items()}
    for text in texts:
        for sample, _, value in samples(text):
            if name := named.get(sample):
                values[name] += value
    return values


def samples(text: str) -> Iterator[tuple[str, dict[str, str], float]]:
    """Name, labels and value of each sample of a Prometheus text."""
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            # The parser gives every counter's name an end that Triton's have not.
            is_counter = family.type == "counter"
            name = sample.name.removesuffix("_total") if is_counter else sample.name
            yield name, sample.labels, sample.value
