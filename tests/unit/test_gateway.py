"""How the gateway understands what Triton says."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from pagetide.engine.requests import internal_error
from pagetide.gateway.answers import Answers, CompletionChoice, Echo, Usage
from pagetide.gateway.bodies import StreamOptions
from pagetide.gateway.door import Door, Rules
from pagetide.gateway.errors import ApiError, of_text, of_triton
from pagetide.gateway.logprobs import first_token
from pagetide.gateway.models import Models
from pagetide.gateway.service import _events
from pagetide.gateway.shapes import Chunks
from pagetide.gateway.status import summed
from pagetide.gateway.triton import Generation, Piece, Triton
from pagetide.serving.client import NOT_RUNNING
from tritonclient.grpc import service_pb2 as pb

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
        (
            "Failed to process the request(s) for model instance 'llm_0', "
            "message: Stub process 'llm_0' is not healthy.",
            503,
        ),
        ("there is no field of sampling_parameters called 'x is not ready'", 400),
        ("there is no field of sampling_parameters called 'Stub process'", 400),
        ("top_k is -3, must be from -1 to 2147483647", 400),
    ],
)
def test_an_errors_text_tells_whose_fault_it_is(text, status):
    assert of_text(f"in ensemble 'ensemble', {text}").status == status
    assert of_triton(grpc.StatusCode.UNKNOWN, text).message == text


@pytest.mark.parametrize(
    "code, message",
    [
        (grpc.StatusCode.UNAVAILABLE, "failed to connect"),
        (grpc.StatusCode.INTERNAL, "Received RST_STREAM with error code 2"),
        (grpc.StatusCode.UNKNOWN, "Stream removed"),
        (grpc.StatusCode.CANCELLED, "CANCELLED"),
    ],
)
def test_a_server_that_is_gone_is_no_fault_of_the_client(code, message):
    assert of_triton(code, message).status == 503


def test_what_a_template_refuses_is_the_clients_fault_under_any_code():
    assert of_triton(grpc.StatusCode.INTERNAL, "messages cannot be rendered").status == 400


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


def piece(index: int, text: str, prompt: list[Any] | None = None, reason: str = "") -> Piece:
    token = {"1": {"logprob": -1.0, "rank": 1, "decoded_token": text}}
    logprobs = {"logprobs": [token], **({"prompt_logprobs": prompt} if prompt else {})}
    return Piece(index, text, reason, 2, 1, 0, logprobs)


def test_each_answer_has_the_prompts_tokens_and_their_places():
    """The first answer alone is told of the prompt, and may come later than the second."""
    prompt = [None, {"7": {"logprob": -2.0, "rank": 1, "decoded_token": "lo"}}]
    echo = Echo("Hello")
    answers = Answers(2, lambda index: CompletionChoice(index, echo, True), first_leads=True)
    assert not list(answers.take(0, piece(1, " b")))
    found = [*answers.take(0, piece(0, " a", prompt)), *answers.take(0, piece(1, "c", reason="stop"))]
    assert found[0]["index"] == 0 and found[0]["logprobs"]["tokens"] == ["Hel", "lo", " a"]
    joined = Chunks("text_completion", "id", "m", answers.usage, StreamOptions()).whole(found)
    second = joined["choices"][1]
    assert second["text"] == "Hello bc" == "".join(second["logprobs"]["tokens"])
    assert second["logprobs"]["text_offset"] == [0, 3, 5, 7]
    assert second["logprobs"]["token_logprobs"] == [None, -2.0, -1.0, -1.0]


def test_the_first_token_of_a_prompt_may_have_no_text():
    """One that stands for the beginning of a text."""
    entry = {"7": {"logprob": -2.0, "rank": 1, "decoded_token": "Hi"}}
    assert first_token("Hi", [None, entry]) == ""
    assert first_token("Hi", [None]) == "Hi"
    assert first_token("H\ufffd", [None, entry]) == "", "what was cut within a character cannot be told"


class Templates:
    """A Triton that renders chats by a template that opens thoughts unless it is told not to."""

    def __init__(self) -> None:
        self.num_rendered, self.error = 0, ApiError(503, "not yet")
        self.fails = False

    async def tokenize(self, model: str, prompt: dict[str, Any]) -> list[int]:
        await asyncio.sleep(0)
        self.num_rendered += 1
        if self.fails:
            raise self.error
        variables = prompt.get("chat_template_kwargs", {})
        return [int(prompt["add_generation_prompt"] and variables.get("thinking", True))]

    async def detokenize(self, model: str, ids: list[int]) -> str:
        return "question<think>\n" if ids == [1] else "question"


def test_a_template_is_asked_once_for_each_of_its_variables():
    async def run() -> None:
        triton = Templates()
        models = Models(triton)
        found = await asyncio.gather(*(models.habits("m") for _ in range(50)))
        assert triton.num_rendered == 3 and all(habits.begins_thinking for habits in found)
        assert not (await models.habits("m", {"thinking": False})).begins_thinking
        assert triton.num_rendered == 6 and (await models.habits("m", {})).begins_thinking
        for number in range(400):
            await models.habits("m", {"x": number})
            assert (await models.habits("m")).begins_thinking
        assert triton.num_rendered == 6 + 3 * 400, "what is asked for often is kept"
        assert (await models.habits("m", {"x": "y" * 10_000})).begins_thinking
        assert triton.num_rendered == 6 + 3 * 400 and len(models._habits) <= 256

    asyncio.run(run())


def test_habits_are_asked_again_after_an_error_and_after_a_while():
    async def run() -> None:
        triton = Templates()
        models = Models(triton)
        triton.fails = True
        found = await asyncio.gather(*(models.habits("m") for _ in range(3)), return_exceptions=True)
        assert found == [triton.error] * 3
        leaving = asyncio.ensure_future(models.habits("m"))
        await asyncio.sleep(0)
        leaving.cancel()
        triton.fails = False
        await asyncio.sleep(0.01)
        assert (await models.habits("m")).begins_thinking
        triton.fails = True
        models._habits["m", ""].until = 0.0
        assert (await models.habits("m")).begins_thinking, "the last that is known"
        await asyncio.sleep(0.01)
        assert (await models.habits("m")).begins_thinking and triton.num_rendered >= 5

    asyncio.run(run())


@pytest.mark.parametrize("name", ["m" * 300, "\ud800", "nobody"])
def test_names_that_no_file_can_have_are_no_models(name, tmp_path):
    async def run() -> None:
        models = Models(Served(), lora_dir=tmp_path)
        assert (await models.choose("ensemble")).triton == "ensemble"
        with pytest.raises(ApiError) as refusal:
            await models.choose(name)
        assert (refusal.value.status, refusal.value.param) == (404, "model")

    asyncio.run(run())


class Served:
    async def models(self) -> list[str]:
        return ["ensemble"]


class Call:
    """A stream of Triton's; what is read of it, and whether it was cancelled."""

    def __init__(self, responses: list[Any]):
        self.left, self.is_cancelled = responses, False

    def __aiter__(self) -> Call:
        return self

    async def __anext__(self) -> Any:
        await asyncio.sleep(0)
        if not self.left:
            raise StopAsyncIteration
        return self.left.pop(0)

    def cancel(self) -> None:
        self.is_cancelled = True


def stub_of(call: Call) -> Any:
    """num_ended: how often a request was ended by its name."""

    async def end(request: Any, timeout: float) -> None:
        stub.num_ended += 1

    stub = SimpleNamespace(num_ended=0, ModelInfer=end, ModelStreamInfer=lambda requests, metadata: call)
    return stub


def last_response() -> Any:
    response = pb.ModelStreamInferResponse()
    response.infer_response.parameters["triton_final_response"].bool_param = True
    return response


async def answered(stub: Any) -> list[Piece]:
    triton = Triton(["127.0.0.1:1"])
    try:
        return [
            one async for one in triton._answer(stub, Generation("ensemble", "1", {"text_input": "x"}, {}))
        ]
    finally:
        await triton.close()


def test_a_stream_is_read_to_its_end_behind_its_last_response():
    call = Call([last_response(), pb.ModelStreamInferResponse()])
    assert asyncio.run(answered(stub := stub_of(call))) == []
    assert not call.left and not call.is_cancelled and not stub.num_ended


def test_a_stream_that_breaks_off_is_an_error_and_its_request_is_ended():
    call = Call([pb.ModelStreamInferResponse()])
    with pytest.raises(ApiError, match="before it was whole") as error:
        asyncio.run(answered(stub := stub_of(call)))
    assert error.value.status == 503 and call.is_cancelled and stub.num_ended


def test_whatever_fails_in_the_midst_of_a_stream_is_told_in_it():
    async def run() -> list[bytes]:
        async def choices() -> Any:
            yield {"index": 0, "text": "a", "logprobs": None, "finish_reason": None}
            raise ValueError("which no client may see")

        shape = Chunks("text_completion", "id", "m", Usage(), StreamOptions())
        return [event async for event in _events(shape, None, choices())]

    first, failure, done = asyncio.run(run())
    assert b'"text":"a"' in first and b'"server_error"' in failure and b"no client" not in failure
    assert done == b"data: [DONE]\n\n"
