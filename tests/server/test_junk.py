"""Generated junk at the running server, beside streams that must not notice: always one clear error or one
answer, never a hang or a crash.
"""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpc
from client import Streams, generate, stream_one, wait_for, wait_until_idle
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pagetide.contract.fields import FIELDS, tensor_fields
from test_streams import START
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

relaxed = settings(max_examples=150, suppress_health_check=list(HealthCheck), print_blob=True)
NAMES = [name for name, _ in tensor_fields()]
TYPES = [np.int32, np.int64, np.uint64, np.float32, np.float16, np.bool_, np.object_]
SHAPES = st.one_of(st.just((1, 1)), st.lists(st.integers(0, 3), max_size=3).map(tuple))
# What was drawn may well ask for the rest of the context, which takes a slow machine minutes: that ends here,
# with some tokens. Nothing that hangs has any.
LONGEST_US = 10_000_000
numbers = st.one_of(
    st.floats(),
    st.integers(-(2**70), 2**70),
    st.sampled_from([float("nan"), float("inf"), 1e308, -1e-308, 2**31, -(2**63)]),
)
json_values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(max_size=8),
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=4), v, max_size=3),
)


@pytest.fixture(scope="module")
def neighbours(parrot) -> Iterator[None]:
    """Streams that run all the while, one after the other, and say the same as ever."""
    streams, sent = Streams(parrot), []
    for i in range(4):
        sent.append(
            streams.send(
                "ensemble", f"n{i}", input_ids=START, max_tokens=10_000, temperature=0.0, stream=True
            )
        )
    wait_for(lambda: all(stream.responses for stream in sent), what="first responses")
    yield
    for stream in sent:
        assert stream.done.wait(300) and not stream.errors
        assert (
            len(stream.ids()) == 10_000
            and stream.ids()[:50] == sent[0].ids()[:50]
            and stream.text == sent[0].text
        )
    streams.close()
    wait_until_idle(parrot)


@st.composite
def junk_tensors(draw) -> dict[str, np.ndarray]:
    tensors = {}
    for name in draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True)):
        field = next(f for f in FIELDS if name in f.names)
        right = {
            "BYTES": np.object_,
            "FP32": np.float32,
            "INT32": np.int32,
            "UINT64": np.uint64,
            "BOOL": np.bool_,
            "FP16": np.float16,
        }[field.dtype]
        dtype, shape = draw(st.sampled_from([right, right, right, *TYPES])), draw(SHAPES)
        count = int(np.prod(shape))
        if dtype is np.object_:
            items: list[Any] = draw(st.lists(st.binary(max_size=12), min_size=count, max_size=count))
            array = np.empty(count, np.object_)
            array[:] = items
        else:
            bits = draw(st.binary(min_size=count * 8, max_size=count * 8))
            array = np.frombuffer(bits, np.uint8)[: count * np.dtype(dtype).itemsize].copy().view(dtype)
            array = array != 0 if dtype is np.bool_ else array
        tensors[name] = array.reshape(shape)
    return tensors


def one_answer_or_one_clear_error(server: Any, model: str, tensors: dict[str, np.ndarray]) -> None:
    inputs = []
    for name, array in tensors.items():
        tensor = grpc.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
        tensor.set_data_from_numpy(array)
        inputs.append(tensor)
    with grpc.InferenceServerClient(server.address.grpc) as client:
        try:
            answer = client.infer(model, inputs, client_timeout=120, timeout=LONGEST_US)
        except InferenceServerException as error:
            assert "Deadline" not in str(error), f"no answer: {tensors}"
            assert len(error.message()) > 10 and "internal error" not in error.message(), (
                error.message(),
                tensors,
            )
        else:
            assert b"timeout" not in answer.as_numpy("finish_reason") or answer.as_numpy("output_ids").size


def one_json_answer(server: Any, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    status, answer = generate(server, {"timeout": LONGEST_US, **body}, model="ensemble_unary")
    assert "internal error" not in answer.get("error", ""), (answer, body)
    assert "timeout" not in answer.get("finish_reason", "") or answer["output_ids"], (answer, body)
    return status, answer


@relaxed
@given(junk_tensors(), st.sampled_from(["ensemble_unary", "llm_unary"]), st.booleans())
def test_junk_tensors(parrot, neighbours, tensors, model, has_prompt):
    if has_prompt:
        tensors = {"max_tokens": np.array([[2]], np.int32), **tensors, "input_ids": np.array([[1]], np.int32)}
    one_answer_or_one_clear_error(parrot, model, tensors)


@relaxed
@given(st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=10), json_values, max_size=4), st.booleans())
def test_junk_json(parrot, neighbours, body, nested):
    values = {"max_tokens": 2, "input_ids": [1], **({"parameters": body} if nested else body)}
    status, answer = one_json_answer(parrot, values)
    # Triton itself says 500 to a value of the wrong JSON type under a tensor's name; in its own clear words.
    assert status in (200, 400, 500) and ("text_output" in answer or answer["error"]), (status, answer)


@relaxed
@given(
    st.dictionaries(
        st.sampled_from([name for f in FIELDS for name in f.names]) | st.text(max_size=10),
        json_values,
        max_size=4,
    )
)
def test_junk_in_sampling_parameters(parrot, neighbours, values):
    body = {"input_ids": [1], "max_tokens": 2, "sampling_parameters": json.dumps(values)}
    status, answer = one_json_answer(parrot, body)
    assert status in (200, 400), (answer, values)


HUGE = 10 * 2**20


@pytest.mark.parametrize(
    "values, message",
    [
        (
            {"text_input": "x" * HUGE},
            "the prompt has 10485760 characters, which are more tokens than the model's context has",
        ),
        (
            {"text_input": "x", "stop_words": ["y" * HUGE]},
            "stop_words has 1 texts of up to 10485760 characters",
        ),
        (
            {"text_input": "x", "bad_words": ["y" * HUGE]},
            "bad_words has 1 texts of up to 10485760 characters",
        ),
        ({"text_input": "x", "sampling_parameters": "{" * HUGE}, "sampling_parameters is not valid JSON"),
        ({"text_input": "x", "logit_bias": '{"1": ' + "9" * HUGE + "}"}, "logit_bias"),
        (
            {"text_input": "x", "guided_decoding_guide_type": "regex", "guided_decoding_guide": "a" * HUGE},
            "guided_decoding_guide has 10485760",
        ),
        (
            {"messages": '[{"role": "user", "content": "' + "x" * HUGE + '"}]'},
            "messages need a chat template",
        ),
        ({"input_ids": [1] * (HUGE // 4)}, "the prompt has 2621440 tokens"),
        ({"text_input": "x", "cache_salt": "s" * HUGE}, "cache_salt has 10485760 characters"),
        (
            {"text_input": "x", "embedding_bias_words": ["w"] * 5000, "embedding_bias_weights": [1.0] * 5000},
            "embedding_bias_words has 5000",
        ),
        ({"text_input": "x", "stop_token_ids": [1] * 100_000}, "stop_token_ids has 100000 tokens"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_ten_megabytes_of_anything_are_one_clear_error(parrot, neighbours, values, message):
    stream = stream_one(parrot, timeout=60, **values)
    assert len(stream.errors) == 1 and message in stream.errors[0], (
        stream.errors[0][:300] if stream.errors else stream.responses
    )
    assert len(stream.errors[0]) < 1500, "an error is a sentence, whatever was sent"


def test_broken_http_leaves_the_server_alone(parrot, neighbours):
    for raw in (
        b"GET",
        b"POST /v2/models/ensemble/generate HTTP/1.1\r\nContent-Length: 100\r\n\r\n{",
        b"\x00" * 1000,
    ):
        with socket.create_connection(parrot.address.http.split(":")) as connection:
            connection.sendall(raw)
    for body in (
        b"",
        b"{",
        b"[]",
        b'{"text_input": "\xff"}',
        b'{"text_input": "a", "text_input": "b"}',
        b"null",
        b"{}",
    ):
        connection = http.client.HTTPConnection(parrot.address.http, timeout=30)
        connection.request("POST", "/v2/models/ensemble_unary/generate", body)
        answer = connection.getresponse()
        assert answer.status in (400, 500) and json.loads(answer.read())["error"]
        connection.close()


def test_unknown_tensors_outputs_and_models_are_told(parrot, neighbours):
    assert "no_such_tensor" in stream_one(parrot, input_ids=[1], no_such_tensor=[1]).errors[0]
    assert "no_such_model" in stream_one(parrot, "no_such_model", input_ids=[1]).errors[0]
    streams = Streams(parrot)
    assert generate(parrot, {"input_ids": [1], "max_tokens": 1}, model="ensemble_unary")[0] == 200
    streams.close()
