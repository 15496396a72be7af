"""How the gateway understands what Triton says."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from pagetide.engine.requests import internal_error
from pagetide.gateway.door import Door, Rules
from pagetide.gateway.errors import of_text, of_triton
from pagetide.gateway.status import summed
from pagetide.serving.client import NOT_RUNNING

FULL = "Exceeds maximum queue size: Maximum queue size of 5 requests reached"


@pytest.mark.parametrize(
    "text, status",
    [
        (FULL, 429),
        (NOT_RUNNING, 503),
        ("the engine failed while it was working on this request; send it again", 503),
        (str(internal_error(ValueError())), 500),
        ("internal error (ValueError); the server's log says more", 500),
        ("the server is stopping and takes no more requests; send it to another one", 503),
        ("Stub process 'llm_0' is not healthy.", 503),
        ("top_k is -3, must be from -1 to 2147483647", 400),
    ],
)
def test_an_errors_text_tells_whose_fault_it_is(text, status):
    assert of_text(f"in ensemble 'ensemble', {text}").status == status
    assert of_triton(grpc.StatusCode.UNKNOWN, text).message == text


def test_a_server_that_is_gone_is_no_fault_of_the_client():
    assert of_triton(grpc.StatusCode.UNAVAILABLE, "failed to connect").status == 503


def test_status_adds_up_what_several_tritons_say():
    text = """# TYPE pagetide_requests_running gauge
pagetide_requests_running{model="llm"} 3
# TYPE pagetide_step_sequences_sum counter
pagetide_step_sequences_sum{model="llm"} 40
# TYPE pagetide_kv_blocks_total gauge
pagetide_kv_blocks_total{model="llm"} 9
# TYPE nv_inference_count counter
nv_inference_count{model="llm"} 7
"""
    found = summed([text, text.replace(" 3\n", " 2\n")])
    shown = [found[name] for name in ("running", "step_sequences", "blocks_total", "waiting")]
    assert shown == [5, 80, 18, 0]


@pytest.mark.parametrize(
    ("message", "seconds"),
    [
        ("the server is full: the queue takes 12 s or more, ...; send the request again in 4 s", "4"),
        (FULL, "1"),
    ],
)
def test_a_refusal_over_http_says_when_to_come_back(message, seconds):
    """Over unary calls too, which have Triton's code."""
    for error in (of_text(message), of_triton(grpc.StatusCode.UNAVAILABLE, message)):
        assert error.status == 429 and error.response().headers["Retry-After"] == seconds


def test_who_has_a_key_is_one_user_whose_name_does_not_tell_it():
    seen: dict[str, str] = {}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen[key] = scope["state"]["user"]

    async def nothing(*_: Any) -> dict[str, Any]:
        return {"type": "http.request", "body": b""}

    door = Door(app, Rules(keys=("secret", "other")))
    for key in ("secret", "other"):
        headers = [(b"authorization", f"Bearer {key}".encode())]
        scope = {"type": "http", "path": "/v1/completions", "method": "POST", "headers": headers}
        asyncio.run(door(scope, nothing, nothing))
    assert len(set(seen.values())) == 2
    assert not any(key in name for key, name in seen.items())
