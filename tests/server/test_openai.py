"""The gateway through the official OpenAI client, on a real server."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import psutil
import pytest
from client import generate, metric, start, wait_for
from gateway import Gateway
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pagetide.contract.fields import FIELDS as CONTRACT
from pagetide.gateway import models
from pagetide.gateway.bodies import ChatBody, CompletionBody, ResponsesBody
from pagetide.gateway.errors import ApiError
from pagetide.gateway.triton import Generation, Triton
from parrot import write_parrot
from triton_server import free_address

FRANCE = [{"role": "user", "content": "What is the capital of France?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Oslo"]}, "days": {"$ref": "#/$defs/few"}},
            "required": ["city", "days"],
            "additionalProperties": False,
            "$defs": {"few": {"type": "integer", "minimum": 1, "maximum": 7}},
        },
    },
}


ODD_TOOL = {
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"$defs": []}}}],
    "tool_choice": "required",
}


def chat(client: openai.OpenAI, messages: Any = FRANCE, **options: Any) -> Any:
    return client.chat.completions.create(
        model="ensemble", messages=messages, temperature=0, **{"max_tokens": 12, **options}
    )


def joined(stream: Any) -> tuple[str, str | None, Any]:
    """Text, reason and usage of a stream with one answer."""
    text, reason, usage = "", None, None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reason = choice.finish_reason or reason
    return text, reason, usage


def test_a_chat_streamed_and_whole_is_what_triton_says(real, client):
    whole = chat(client)
    body = {"messages": json.dumps(FRANCE), "max_tokens": 12, "temperature": 0}
    _, direct = generate(real, body)
    assert whole.choices[0].message.content == direct["text_output"]
    assert (whole.choices[0].finish_reason, whole.usage.completion_tokens) == ("stop", 8)
    text, reason, usage = joined(chat(client, stream=True, stream_options={"include_usage": True}))
    assert (text, reason) == (direct["text_output"], "stop")
    assert usage.prompt_tokens == whole.usage.prompt_tokens
    assert usage.prompt_tokens_details.cached_tokens > 0


def test_the_asyncio_client_gets_many_answers_at_once(gateway):
    async def ask() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none") as client:
            one = client.chat.completions.create
            return await asyncio.gather(
                *[one(model="ensemble", messages=FRANCE, max_tokens=5, temperature=0) for _ in range(8)]
            )

    texts = {answer.choices[0].message.content for answer in asyncio.run(ask())}
    assert len(texts) == 1


def test_what_a_triton_that_is_not_there_cannot_serve_another_does(real):
    gateway = Gateway(real, triton=f"127.0.0.1:1,{real.address.grpc},127.0.0.1:2")
    try:
        for _ in range(4):
            for stream in (False, True):
                body = {"messages": FRANCE, "temperature": 0, "max_tokens": 8, "stream": stream}
                status, answer = gateway.ask("/v1/chat/completions", body)
                assert status == 200 and b"Paris" in answer, answer
            assert gateway.ask("/tokenize", {"prompt": "tide"})[0] == gateway.status("/v1/models") == 200
            assert gateway.status("/health") == 200
        wrong = {"messages": FRANCE, "temperature": 0, "best_of": 2, "n": 3}
        assert gateway.ask("/v1/chat/completions", wrong)[0] == 400, "what is wrong is wrong everywhere"
    finally:
        gateway.stop()


def test_an_answer_comes_from_the_next_triton_if_the_first_is_not_there(real):
    """Asked at once: nobody knows yet that it is not."""

    gone = ["127.0.0.1:1", "127.0.0.1:2"]

    async def ask(urls: list[str], text: str) -> str:
        triton = Triton(urls)
        fields = {"max_tokens": 8, "temperature": 0, "stream": True}
        try:
            pieces = triton.generate(Generation("ensemble", "next", {"text_input": text}, fields))
            return "".join([piece.text async for piece in pieces])
        finally:
            await triton.close()

    for number in range(8):  # each prompt has an order of its own
        text = f"{number}. The capital of France is"
        alone = asyncio.run(ask([real.address.grpc], text))
        assert alone and asyncio.run(ask([real.address.grpc, *gone], text)) == alone
    with pytest.raises(ApiError) as error:
        asyncio.run(ask(["127.0.0.1:3", *gone], "x"))
    assert error.value.status == 503


def test_a_replica_that_is_killed_under_load_costs_no_answer(real):
    """Whole answers, of which nothing has been sent before the end, are asked of the other one."""
    other = start({"dtype": "float32", "num_blocks": 600})
    gateway = Gateway(real, triton=f"{real.address.grpc},{other.address.grpc}")
    texts = [f"{number}. Tell me something about the sea." for number in range(12)]

    def answer_to(text: str) -> Any:
        body = {"prompt": text, "temperature": 0, "max_tokens": 48, "ignore_eos": True}
        status, answer = gateway.ask("/v1/completions", body)
        assert status == 200, answer
        return json.loads(answer)

    def ask(text: str) -> str:
        return answer_to(text)["choices"][0]["text"]

    try:
        for number in range(5):
            answers = [answer_to(f"{number} is where a long text begins. " + "The sea. " * 20) for _ in "123"]
            cached = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers]
            assert cached[0] < 16 <= cached[1] == cached[2], "it stays where its beginning is known"
        before = [ask(text) for text in texts]
        wait_for(lambda: metric(other, "pagetide_generated_tokens") >= 48, what="some for each")
        with ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(ask, text) for text in texts * 3]
            wait_for(lambda: sum(one.done() for one in asked) >= 6, 120, "six answers")
            psutil.Process(other.pid).kill()
            assert [one.result(120) for one in asked] == before * 3
    finally:
        gateway.stop()
        other.stop()


def test_several_answers_and_seeds(client):
    def ask(seed: int) -> list[str]:
        found = client.chat.completions.create(
            model="ensemble", messages=FRANCE, max_tokens=8, temperature=2, seed=seed, n=3
        )
        assert [choice.index for choice in found.choices] == [0, 1, 2]
        return [choice.message.content for choice in found.choices]

    assert ask(-5) == ask(-5) != ask(6)


def test_completions_have_prompts_of_every_kind(client):
    ids = [504, 3575, 282, 4649, 314]
    for prompt, count in ((["The capital", "A tide"], 2), ("A tide", 1), (ids, 1), ([ids, ids], 2)):
        found = client.completions.create(model="ensemble", prompt=prompt, max_tokens=4, temperature=0, n=2)
        assert [choice.index for choice in found.choices] == list(range(2 * count))
        assert found.usage.completion_tokens == 8 * count


@pytest.mark.parametrize("stream", [False, True])
def test_echo_has_the_prompt_and_its_log_probabilities(client, stream):
    asked = {"max_tokens": 3, "echo": True, "logprobs": 2, "n": 2, "seed": 1, "stream": stream}
    found = client.completions.create(model="ensemble", prompt=["The capital of France", "Tides"], **asked)
    pieces = [choice for chunk in found for choice in chunk.choices] if stream else found.choices
    for index, prompt in enumerate(["The capital of France"] * 2 + ["Tides"] * 2):
        own = [piece for piece in pieces if piece.index == index]
        text, tokens, logprobs, places, tops = "", [], [], [], []
        for piece in own:
            text += piece.text
            tokens += piece.logprobs.tokens
            logprobs += piece.logprobs.token_logprobs
            places += piece.logprobs.text_offset
            tops += piece.logprobs.top_logprobs
        assert text.startswith(prompt) and "".join(tokens) == text
        assert places == [len("".join(tokens[:at])) for at in range(len(tokens))]
        assert logprobs[0] is None and None not in logprobs[1:] and len(tops[-1]) >= 2


def test_the_least_top_p_takes_the_likeliest(client):
    """OpenAI's 0 asks for that; the contract's means that none is given."""
    asked = {"model": "ensemble", "prompt": "The tide", "max_tokens": 12}
    likeliest = client.completions.create(temperature=0, **asked).choices[0].text
    for seed in range(4):
        assert (
            client.completions.create(top_p=0, temperature=2, seed=seed, **asked).choices[0].text == likeliest
        )


@pytest.mark.parametrize("num_top", [0, 3])
def test_log_probabilities_of_chats(client, num_top):
    (choice,) = chat(client, logprobs=True, top_logprobs=num_top, max_tokens=4).choices
    assert len(choice.logprobs.content) == 4
    for token in choice.logprobs.content:
        assert bytes(token.bytes).decode() == token.token and len(token.top_logprobs) == num_top
        assert not num_top or token.top_logprobs[0].logprob == token.logprob, "greedy takes the likeliest"


def test_tokens_that_are_parts_of_a_character_have_their_bytes(client):
    """The characters of a prompt that is echoed are many tokens each."""
    text = "\U0001f9ab\u2603"
    (choice,) = chat(
        client,
        messages=[{"role": "user", "content": f"Repeat: {text}"}],
        logprobs=True,
        max_tokens=8,
        response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": {"const": text}}},
    ).choices
    raw = b"".join(bytes(token.bytes) for token in choice.logprobs.content)
    assert text in raw.decode() and any("\ufffd" in token.token for token in choice.logprobs.content)


def test_stops_biases_and_our_own_fields(client):
    assert chat(client, stop=["Paris"]).choices[0].finish_reason == "stop"
    assert "Paris" not in chat(client, stop="Paris").choices[0].message.content
    biased = chat(client, logit_bias={"30": 100}, max_tokens=3).choices[0].message.content
    assert biased == "..."
    assert chat(client, extra_body={"ignore_eos": True, "min_p": 0.5, "top_k": 3}).choices


def test_an_answer_follows_its_schema(client):
    schema = WEATHER["function"]["parameters"]
    wanted = {"type": "json_schema", "json_schema": {"name": "w", "strict": True, "schema": schema}}
    answer = json.loads(chat(client, response_format=wanted, max_tokens=60).choices[0].message.content)
    assert answer["city"] in ("Paris", "Oslo") and 1 <= answer["days"] <= 7


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_was_asked_for_always_parses(client, choice, stream):
    options = {"tools": [WEATHER], "tool_choice": choice, "parallel_tool_calls": False, "max_tokens": 80}
    if stream:
        chunks = [c.choices[0] for c in chat(client, stream=True, **options) if c.choices]
        calls = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
        assert calls[0].id and calls[0].function.name == "get_weather"
        arguments, reason = "".join(call.function.arguments for call in calls), chunks[-1].finish_reason
    else:
        (found,) = chat(client, **options).choices
        (call,) = found.message.tool_calls
        assert call.function.name == "get_weather" and found.message.content is None
        arguments, reason = call.function.arguments, found.finish_reason
    assert json.loads(arguments)["city"] in ("Paris", "Oslo")
    assert reason == ("tool_calls" if choice == "required" else "stop")


def test_an_assistants_message_is_gone_on_with(client):
    messages = [*FRANCE, {"role": "assistant", "content": "The capital of France is"}]
    answer = chat(client, messages, extra_body={"continue_final_message": True})
    assert answer.choices[0].message.content.startswith(" Paris")


def test_models_tokens_and_metrics(gateway, client):
    assert [model.id for model in client.models.list()] == ["ensemble"]
    assert client.models.retrieve("ensemble").id == "ensemble"
    _, found = gateway.ask("/tokenize", {"prompt": "The tide rises 🌊"})
    assert json.loads(gateway.ask("/tokenize", {"prompt": ""})[1]) == {"tokens": [], "count": 0}
    _, back = gateway.ask("/detokenize", {"tokens": json.loads(found)["tokens"]})
    assert json.loads(back)["prompt"] == "The tide rises 🌊"
    status, metrics = gateway.ask("/metrics")
    assert status == 200 and b'requests_total{path="/tokenize",status="200"}' in metrics


@pytest.mark.parametrize(
    "path, body, status, param",
    [
        ("/v1/chat/completions", b"{", 400, None),
        ("/v1/chat/completions", {"messages": []}, 422, "messages"),
        ("/v1/chat/completions", {"messages": FRANCE, "temperature": 3}, 422, "temperature"),
        ("/v1/chat/completions", {"messages": FRANCE, "model": "gpt-5"}, 404, "model"),
        ("/v1/chat/completions", {"messages": FRANCE, "max_token": 3}, 400, None),
        ("/v1/chat/completions", {"messages": FRANCE, "top_k": -3}, 400, "top_k"),
        ("/v1/chat/completions", {"messages": FRANCE, "functions": [{}]}, 400, "functions"),
        ("/v1/chat/completions", {"messages": FRANCE, "tool_choice": "required"}, 400, "tool_choice"),
        ("/v1/chat/completions", {"messages": FRANCE, "top_logprobs": 2}, 400, "top_logprobs"),
        ("/v1/chat/completions", {"messages": [{"content": "x"}]}, 400, "messages"),
        ("/v1/completions", {"prompt": "x", "suffix": "y"}, 400, "suffix"),
        ("/v1/completions", {"prompt": []}, 400, "prompt"),
        ("/v1/completions", {"prompt": "x", "n": 2, "best_of": 1}, 400, "best_of"),
        ("/v1/completions", {"prompt": "x " * 9000}, 400, None),
        ("/v1/completions", {"prompt": ["x"] * 257}, 400, "prompt"),
        ("/v1/completions", {"prompt": "x", "n": 100}, 400, "n"),
        ("/v1/completions", {"prompt": "\ud800"}, 400, "prompt"),
        ("/v1/completions", {"prompt": "", "echo": True}, 400, None),
        ("/v1/completions", {"prompt": "x", "model": "m" * 300}, 404, "model"),
        ("/v1/completions", {"prompt": "x", "model": "\ud800"}, 404, "model"),
        ("/v1/completions", {"prompt": "x", "prompt_logprobs": 1}, 400, "prompt_logprobs"),
        ("/v1/completions", {"prompt": "x", "x is not ready": 1}, 400, None),
        ("/v1/chat/completions", {"messages": FRANCE, **ODD_TOOL}, 400, "tools"),
        ("/v1/responses", {"input": []}, 422, "input"),
        ("/v1/responses", {"input": "x", "previous_response_id": "resp_1"}, 400, "previous_response_id"),
        ("/v1/responses", {"input": "x", "stop": 5}, 422, "stop"),
        ("/v1/responses", {"input": "\ud800", "instructions": None}, 400, "input"),
        ("/v1/embeddings", {"input": "x"}, 404, "model"),
        ("/v1/nothing", {}, 404, None),
    ],
)
def test_errors_have_openais_shape_and_name_the_field(gateway, path, body, status, param):
    found, answer = gateway.ask(path, body)
    assert (found, answer["error"]["param"]) == (status, param), answer
    assert answer["error"]["type"] == "invalid_request_error" and answer["error"]["message"]
    if isinstance(body, dict):
        streamed, same = gateway.ask(path, {**body, "stream": True})
        assert streamed == status and same["error"]["param"] == param, "the same where a stream was asked for"


JUNK = st.sampled_from(
    [None, True, -1, 0, 1, 2.5, 10**30, "", "x", "🌊", "\ud800", "x" * 300, [], ["a"], [1], {}, {"a": 1}]
)
BODIES = {
    "/v1/chat/completions": (ChatBody, {"messages": FRANCE, "max_completion_tokens": 2}),
    "/v1/completions": (CompletionBody, {"prompt": "x", "max_tokens": 2}),
    "/v1/responses": (ResponsesBody, {"input": "x", "max_output_tokens": 2}),
}
FIELDS = sorted(
    {*(name for body, _ in BODIES.values() for name in body.model_fields), "user"}
    | {f.name for f in CONTRACT}
)


@settings(max_examples=200, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(sorted(BODIES)), st.dictionaries(st.sampled_from(FIELDS), JUNK, max_size=3))
def test_any_body_has_an_answer_or_an_openai_error_and_never_a_500(gateway, path, junk):
    status, answer = gateway.ask(path, {**BODIES[path][1], **junk})
    if status == 200:
        assert (b'"output"' if path == "/v1/responses" else b'"choices"') in answer
    else:
        assert 400 <= status < 500 and answer["error"]["message"], (status, answer)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_request(real, gateway, stream):
    with gateway.client().with_options(timeout=1.5) as client:
        if stream:
            answer = chat(client, max_tokens=1500, stream=True, extra_body={"ignore_eos": True})
            next(iter(answer))
            answer.close()
        else:
            with pytest.raises(openai.APITimeoutError):
                chat(client, max_tokens=1500, n=4, extra_body={"ignore_eos": True})
    wait_for(lambda: metric(real, "pagetide_requests_running") == 0, 5, "nothing runs for nobody")


SLOW = (
    "{% for i in range(slow or 0) %}{% for j in range(1000) %}{% endfor %}{% endfor %}"
    "{% for m in messages %}{{ m.content }}{% endfor %}"
)


def test_a_client_that_leaves_before_the_engine_has_its_request_frees_it(tmp_path):
    """What is ended by its name is not there yet: it is still being rendered."""
    letters = [bytes([byte]) for byte in (10, *range(32, 127))]
    write_parrot(tmp_path, [b"xy"], ends=False, others=letters)
    server = start({"model": str(tmp_path), "chat_template": SLOW, "num_blocks": 600, "max_model_len": 9000})
    gateway = Gateway(server)
    try:
        client = gateway.client()
        extra = {"chat_template_kwargs": {"slow": 60_000}, "ignore_eos": True}
        chat(client, max_tokens=1, extra_body=extra)  # the gateway asks the template what it is like
        with pytest.raises(openai.APITimeoutError):
            chat(client.with_options(timeout=0.3), max_tokens=8000, extra_body=extra)
        wait_for(lambda: metric(server, "pagetide_requests_cancelled") == 1, 30, "its end")
        assert metric(server, "pagetide_requests_running") == 0
    finally:
        gateway.stop()
        server.stop()


def test_a_client_that_does_not_read_is_one_that_has_left(parrot):
    gateway = Gateway(parrot, "--max-stall-s", "1")
    before = metric(parrot, "pagetide_requests_cancelled")
    try:
        # More than all the buffers between two sockets hold.
        asked = {"max_tokens": 9_000, "n": 6, "ignore_eos": True, "stream": True, "logprobs": 5}
        body = json.dumps({"model": "ensemble", "prompt": "Hi", **asked}).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", gateway.port))
            client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            assert client.recv(15) == b"HTTP/1.1 200 OK"
            # Six answers end with one request.
            wait_for(lambda: metric(parrot, "pagetide_requests_cancelled") == before + 1, 120, "its end")
            short = {"model": "ensemble", "prompt": "Hi", "max_tokens": 2}
            assert gateway.ask("/v1/completions", short)[0] == 200
    finally:
        gateway.stop()


def test_keys_and_sizes(real, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("# ours\nsecret\n")
    gateway = Gateway(real, "--api-keys-file", str(keys), "--max-body-mb", "0.01")
    try:
        with pytest.raises(openai.AuthenticationError):
            chat(gateway.client("wrong"))
        assert chat(gateway.client("secret"), max_tokens=1).choices
        status, answer = gateway.ask(
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "x" * 20_000}]},
            {"Authorization": "Bearer secret"},
        )
        assert status == 413 and "10485 bytes" in answer["error"]["message"]
        # A body in chunks does not say its size.
        connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=60)
        headers = {"Authorization": "Bearer secret", "Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", iter([b"x" * 9_000] * 3), headers, encode_chunked=True)
        assert connection.getresponse().status == 413
        assert psutil.Process(gateway.process.pid).memory_info().rss < 150 * 2**20
    finally:
        gateway.stop()


HERMES = """{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>
{{ c.function | tojson }}</tool_call>{% endfor %}{% endfor %}"""
LLAMA3 = """{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}{"name": "{{
c.function.name }}", "parameters": {{ c.function.arguments | tojson }}}{% endfor %}{% endfor %}"""
MISTRAL = """{% for m in messages %}{{ m.content }}{% if m.tool_calls %}[TOOL_CALLS]{{
m.tool_calls | tojson }}{% endif %}{% endfor %}"""
THINKS = """{% for m in messages %}{{ m.content.split("</think>")[-1] }}{% endfor %}"""


@pytest.mark.parametrize(
    "template, text, thoughts, calls",
    [
        (HERMES, '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>', None, '{"x": 1}'),
        (LLAMA3, '{"name": "f", "parameters": {"x": 1}}', None, '{"x": 1}'),
        (MISTRAL, '[TOOL_CALLS][{"name": "f", "arguments": {"x": 1}}]', None, '{"x": 1}'),
        (THINKS, "<think>hm</think>Yes.", "hm", None),
    ],
    ids=["hermes", "llama3", "mistral", "thinks"],
)
def test_calls_and_thoughts_are_found_in_the_form_of_the_template(tmp_path, template, text, thoughts, calls):
    """A model that says this text, with this template."""
    cuts = [text[at : at + 5].encode() for at in range(0, len(text), 5)]
    # Every byte that a template writes needs a token, too.
    letters = [bytes([byte]) for byte in (10, *range(32, 127)) if bytes([byte]) not in cuts]
    assert len(set(cuts)) == len(cuts)
    write_parrot(tmp_path, cuts, ends=True, others=letters)
    server = start({"model": str(tmp_path), "chat_template": template, "num_blocks": 400})
    gateway = Gateway(server)
    try:
        client, options = gateway.client(), {"temperature": 0, "model": "ensemble"}
        tool = {"type": "function", "function": {"name": "f"}}
        tools = {"tools": [tool]} if calls else {}
        messages = [{"role": "user", "content": "~"}]
        (whole,) = client.chat.completions.create(messages=messages, **tools, **options).choices
        chunks = [
            chunk.choices[0].delta
            for chunk in client.chat.completions.create(messages=messages, stream=True, **tools, **options)
        ]
        if calls:
            (call,) = whole.message.tool_calls
            assert (call.function.name, call.function.arguments) == ("f", calls)
            assert whole.finish_reason == "tool_calls" and not whole.message.content
            (streamed,) = [call for delta in chunks for call in delta.tool_calls or ()]
            assert (streamed.function.name, streamed.function.arguments) == ("f", calls)
        else:
            assert (whole.message.reasoning_content, whole.message.content) == (thoughts, "Yes.")
            assert "".join(delta.content or "" for delta in chunks) == "Yes."
    finally:
        gateway.stop()
        server.stop()


def test_a_schema_goes_with_tools_that_need_not_be_called(real):
    """Whatever the form of calls: those of Llama 3 and Mistral have markers that are special tokens."""
    gateway = Gateway(real, "--tool-call-format", "llama3")
    try:
        (choice,) = chat(
            gateway.client(),
            tools=[WEATHER],
            response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": {"const": 1}}},
        ).choices
        assert choice.message.content == "1"
    finally:
        gateway.stop()


OPENS = (
    "{% for m in messages %}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt and thinking is not defined %}<think>{% endif %}"
)


def test_thoughts_are_split_off_only_where_the_prompt_has_opened_them(tmp_path):
    """A guided answer has none, nor one whose prompt is another."""
    cuts = [b"hm</t", b"hink>", b"Yes."]
    letters = [bytes([byte]) for byte in (10, *range(32, 127))]
    write_parrot(tmp_path, cuts, ends=True, others=letters)
    server = start({"model": str(tmp_path), "chat_template": OPENS, "num_blocks": 400})
    gateway = Gateway(server)
    try:
        client = gateway.client()

        def ask(**asked: Any) -> Any:
            options = {"messages": [{"role": "user", "content": "~"}], "temperature": 0, "max_tokens": 40}
            return client.chat.completions.create(model="ensemble", **options | asked).choices[0].message

        def shown(message: Any) -> tuple[str | None, str]:
            return getattr(message, "reasoning_content", None), message.content

        assert shown(ask()) == ("hm", "Yes.")
        assert shown(ask(extra_body={"chat_template_kwargs": {"thinking": False}})) == (
            None,
            "hm</think>Yes.",
        )
        assert shown(ask(extra_body={"add_generation_prompt": False})) == (None, "hm</think>Yes.")
        begun = [{"role": "user", "content": "~"}, {"role": "assistant", "content": "<think>so"}]
        assert shown(ask(messages=begun, extra_body={"continue_final_message": True})) == ("hm", "Yes.")
        begun[1]["content"] += "</think>"
        begun_plain = ask(messages=begun, extra_body={"continue_final_message": True})
        assert shown(begun_plain) == (None, "hm</think>Yes.")
        schema = {"name": "a", "schema": {"const": "Yes."}}
        guided = ask(response_format={"type": "json_schema", "json_schema": schema})
        assert shown(guided) == (None, '"Yes."')
        tool = {"type": "function", "function": {"name": "f", "parameters": {"const": {}}}}
        named = {"type": "function", "function": {"name": "f"}}
        (call,) = ask(tools=[tool], tool_choice=named).tool_calls
        assert json.loads(call.function.arguments) == {}
        response = client.responses.create(model="ensemble", input="~", temperature=0)
        assert [item.type for item in response.output] == ["reasoning", "message"]
        assert response.output[0].content[0].text == "hm" and response.output_text == "Yes."
    finally:
        gateway.stop()
        server.stop()


def test_health_tells_of_an_engine_that_is_stuck(parrot):
    gateway = Gateway(parrot)
    engine = next(p for p in parrot.processes() if "pagetide.engine" in " ".join(p.cmdline()))
    try:
        engine.suspend()
        wait_for(lambda: gateway.status("/health") == 503, 60, "a gateway that has noticed")
    finally:
        engine.resume()
        wait_for(lambda: gateway.status("/health") == 200, what="a healthy gateway")
        gateway.stop()


def test_langchain_chats_and_gets_structured_output(gateway):
    from langchain_openai import ChatOpenAI

    llm = ChatOpenAI(
        model="ensemble", base_url=f"{gateway.url}/v1", api_key="none", temperature=0, max_tokens=80
    )
    assert "Paris" in llm.invoke("What is the capital of France?").content
    assert "Paris" in "".join(chunk.content for chunk in llm.stream("What is the capital of France?"))
    schema = {"title": "weather", "description": "The weather", **WEATHER["function"]["parameters"]}
    for method in ("json_schema", "function_calling"):
        found = llm.with_structured_output(schema, method=method).invoke("The weather in Oslo for 3 days")
        assert found["city"] in ("Paris", "Oslo"), method


def test_litellm_chats(gateway, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    import litellm

    options = {"api_base": f"{gateway.url}/v1", "api_key": "none", "temperature": 0, "max_tokens": 12}
    answer = litellm.completion("openai/ensemble", messages=FRANCE, **options)
    assert "Paris" in answer.choices[0].message.content
    chunks = litellm.completion("openai/ensemble", messages=FRANCE, stream=True, **options)
    assert "Paris" in "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def test_no_request_waits_for_the_list_of_models(real, monkeypatch):
    """A model that was there lately is taken to be there; the list is asked for beside the request."""
    monkeypatch.setattr(models, "_KEPT_S", -1.0)

    async def ask() -> None:
        triton, gone = Triton([real.address.grpc]), Triton([free_address().grpc])
        known = models.Models(triton)
        with pytest.raises(ApiError, match="no_such"):
            await known.find("no_such")
        for _ in range(3):
            assert await known.find("ensemble") == "ensemble" == await known.find(None)
            await known._asking
        known._triton = gone
        assert await known.find("ensemble") == "ensemble"
        await known._asking
        assert await known.find("ensemble") == "ensemble", "the last list that is known"
        with pytest.raises(ApiError, match="cannot be asked"):
            await known.find("no_such")
        await triton.close()
        await gone.close()

    asyncio.run(ask())
