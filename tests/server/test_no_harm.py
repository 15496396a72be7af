"""Inputs that ended, hung or misled a server: each is a case of its kind, and says what is right instead.

Beside them others go on.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from client import Streams, generate, infer_http, metric, stream_one, wait_for, wait_until_idle
from test_streams import START

PROMPT = "The capital of France is"
SHORT = {"text_input": PROMPT, "max_tokens": 5, "temperature": 0}
NOTHING_LEFT = "no token is left to choose"


@pytest.fixture(autouse=True)
def engine_lives_on(real) -> Iterator[None]:
    pids = engines(real)
    yield
    wait_until_idle(real)
    assert engines(real) == pids and metric(real, "pagetide_engine_restarts") == 0


def engines(server: Any) -> list[int]:
    return [process.pid for process in server.processes() if "pagetide.engine" in process.cmdline()]


def guide(kind: str, text: str) -> dict[str, Any]:
    return {"guided_decoding_guide_type": kind, "guided_decoding_guide": text}


def nested(depth: int) -> str:
    return '{"type":"array","items":' * depth + '{"type":"integer"}' + "}" * depth


CHAT = json.dumps([{"role": "user", "content": "hi"}])
REFUSED: list[tuple[dict[str, Any], str]] = [
    # Grammars that allow no token, from the beginning or together with other rules.
    (guide("ebnf_grammar", "root ::= root"), "this grammar accepts nothing"),
    (guide("json_schema", '{"$ref":"#"}'), "this grammar accepts nothing"),
    (guide("json_schema", "false"), "this grammar accepts nothing"),
    (guide("regex", r"[^\s\S]"), "this grammar accepts nothing"),
    ({**guide("choice", '["a"]'), "bad_words": ["a"]}, NOTHING_LEFT),
    ({"allowed_token_ids": [2], "min_tokens": 3, "temperature": 1, "top_p": 0.9}, NOTHING_LEFT),
    ({"allowed_token_ids": [21253], "bad_words": ["London"], "temperature": 1, "top_p": 0.9}, NOTHING_LEFT),
    ({"allowed_token_ids": [21253], "bad_words": ["London"], "num_return_sequences": 3}, NOTHING_LEFT),
    ({"allowed_token_ids": [21253], "bad_words": ["London"], "beam_width": 2}, NOTHING_LEFT),
    # Grammars without bounds.
    (guide("json_schema", nested(900)), "recursion limit exceeded"),
    (guide("ebnf_grammar", "root ::= " + "(" * 7000 + '"a"' + ")" * 7000), "nested too deeply"),
    (guide("regex", "(" * 7000 + "a" + ")" * 7000), "guided_decoding_guide is no valid regex"),
    (guide("json_schema", json.dumps({
        "allOf": [{"anyOf": [{"required": [f"a{i}{j}"]} for i in range(8)]} for j in range(8)]
    })), "json_schema"),
    # Keywords that cannot be kept are refused by name.
    *((guide("json_schema", json.dumps(schema)), word) for schema, word in [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"not": {"type": "string"}}, "not"),
        ({"if": {"type": "string"}, "then": {"maxLength": 2}}, "if"),
        ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired"),
        ({"type": "array", "contains": {"type": "integer"}}, "contains"),
        ({"$ref": "elsewhere"}, "elsewhere"),
    ]),
    # Clients' data is data.
    ({"messages": CHAT, "chat_template_kwargs": '{"chat_template": "HELLO"}'},
     "chat_template_kwargs has chat_template, which no client may set"),
    ({"messages": CHAT, "chat_template_kwargs": '{"tokenize": true, "bos_token": "x"}'},
     "bos_token, tokenize"),
    ({"messages": r'[{"role": "user", "content": "hi \ud83d"}]'}, "messages has a lone surrogate"),
    ({"messages": CHAT, "tools": r'[{"name": "\udc00"}]'}, "tools has a lone surrogate"),
    ({"sampling_parameters": r'{"stop": ["\ud800"]}'}, "lone surrogate"),
    # Ends of ranges.
    ({"repetition_penalty": 1e-40}, "must be from 0.01 to 100"),
    ({"sampling_parameters": json.dumps({"stop_token_ids": [2**70]})},
     "stop_token_ids is 1180591620717411303424, must be from"),
    ({"logit_bias": json.dumps({str(2**70): 1})}, "logit_bias's token is 1180591620717411303424"),
    ({"stop_token_ids": [2**31 - 1]}, "stop_token_ids has the token id 2147483647"),
    ({"parameters": {"timeout": -5}}, "timeout is -5"),
    ({"beam_width": 2, "return_generation_logits": True},
     "return_generation_logits does not go with beam search"),
]  # fmt: skip


@pytest.mark.parametrize(
    "values, message", REFUSED, ids=lambda value: value[:40] if isinstance(value, str) else ""
)
def test_what_cannot_be_answered_is_one_clear_error(real, values, message):
    body = {**SHORT, **values}
    if "messages" in values:
        del body["text_input"]
    status, answer = generate(real, body, model="ensemble_unary")
    assert status == 400 and message in answer["error"], answer
    for internal in ("Traceback", "/work", ".py", "site-packages"):
        assert internal not in answer["error"]
    assert len(answer["error"]) < 1000


def test_a_search_that_ends_early_has_all_its_answers(real):
    values = {"text_input": "hi", "beam_width": 3, "num_return_sequences": 3, "max_tokens": 5}
    status, answer = generate(real, {**values, "timeout_ms": 1}, model="ensemble_unary")
    assert (
        status == 200
        and set(answer["finish_reason"]) <= {"timeout", "length", "stop"}
        and len(answer["finish_reason"]) == 3
    )
    streams = Streams(real)
    searches = [
        streams.send("ensemble", f"b{i}", **{**values, "max_tokens": 1000, "text_input": "word " * 1000})
        for i in range(4)
    ]
    others = Streams(real)
    while not all(search.done.is_set() for search in searches):  # a cancel may be there before its request
        for i in range(4):
            others.send("ensemble", f"b{i}", cancel=True)
        time.sleep(0.1)
    for search in searches:
        assert search.done.wait(60) and not search.errors
        assert [r["finish_reason"] for r in search.responses] == ["cancelled"] * 3 and [
            r["sequence_index"] for r in search.responses
        ] == [0, 1, 2]
    streams.close()
    others.close()


@pytest.mark.parametrize("model", ["llm", "llm_unary", "tensorrt_llm", "ensemble"])
def test_a_time_limit_beyond_all_times_means_never(real, model):
    prompt = {"text_input": PROMPT} if model == "ensemble" else {"input_ids": [504, 3575]}
    length = "request_output_len" if model == "tensorrt_llm" else "max_tokens"
    for body in ({"parameters": {"timeout": 9 * 10**18}}, {"timeout_ms": 2**31 - 1}):
        status, answer = generate(real, {**prompt, length: 3, **body}, model=model)
        assert status == 200 and answer["finish_reason"] in ("length", "stop"), answer


@pytest.mark.parametrize(
    "values",
    [
        {"seed": 2**64 - 1},
        {"priority": -(2**31) + 1},
        {"priority": 2**31 - 1},
        {"top_k": 2**31 - 1},
        {"temperature": 1e6},
        {"max_tokens": 2**31 - 1, "min_tokens": 2**31 - 1, "timeout_ms": 300, "text_input": "x"},
        {"repetition_penalty": 0.01, "presence_penalty": -2, "frequency_penalty": 2, "temperature": 1},
        {"logit_bias": '{"5": 100, "6": -100}'},
        {"length_penalty": -10, "beam_width": 2},
        {"embedding_bias_words": ["a", ""], "embedding_bias_weights": [1000, -1000]},
    ],
)
def test_ends_of_ranges_are_answered(real, values):
    status, answer = generate(real, {**SHORT, **values}, model="ensemble_unary")
    assert status == 200 and answer["finish_reason"], answer


def test_large_requests_do_bounded_work_and_others_go_on(real):
    long_words = [f"w{i} " * 200 for i in range(64)]
    heavy = [
        {"beam_width": 32, "stop_token_ids": list(range(1000, 2024)), "max_tokens": 6},
        {
            "num_return_sequences": 32,
            "max_tokens": 6,
            "embedding_bias_words": long_words,
            "embedding_bias_weights": [1.0] * 64,
        },
        {"stop_words": ["a" * 1000 + str(i) for i in range(64)], "max_tokens": 6, "allowed_token_ids": [94]},
        {"bad_words": [f"x{i} " * 200 for i in range(64)], "max_tokens": 6},
        {**guide("choice", json.dumps([f"c{i}" for i in range(20_000)])), "max_tokens": 6},
    ]
    streams = Streams(real)
    running = streams.send(
        "ensemble", "r", text_input="x", max_tokens=200, ignore_eos=True, stream=True, temperature=0.0
    )
    for values in heavy:
        status, answer = generate(real, {"text_input": "hi", **values}, model="ensemble_unary")
        assert status == 200, answer
    assert running.done.wait(120) and len(running.ids()) == 200
    streams.close()


def test_a_renderer_that_takes_parts_and_one_that_does_not_say_the_same(real):
    whole = [{"role": "user", "content": "Say\nhello"}]
    parts = [
        {"role": "user", "content": [{"type": "text", "text": "Say"}, {"type": "text", "text": "hello"}]}
    ]
    flags = {"max_tokens": 5, "temperature": 0, "return_num_input_tokens": True}
    answers = [
        generate(real, {"messages": json.dumps(chat), **flags}, model="ensemble_unary")[1]
        for chat in (whole, parts)
    ]
    assert [(a["text_output"], a["num_input_tokens"]) for a in answers[:1]] == [
        (a["text_output"], a["num_input_tokens"]) for a in answers[1:]
    ]
    call = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    tool = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2"},
    ]
    assert generate(real, {"messages": json.dumps(tool), **flags}, model="ensemble_unary")[0] == 200
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    status, answer = generate(real, {"messages": json.dumps(image), **flags}, model="ensemble_unary")
    assert status == 400 and "a part of type 'image_url'" in answer["error"]


# -- no wrong answer without a word ------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 2e-38, 0.0009])
def test_a_temperature_near_zero_is_greedy(real, temperature):
    status, answer = generate(
        real, {**SHORT, "temperature": temperature, "top_p": 0.9, "top_k": 5}, model="ensemble_unary"
    )
    assert status == 200 and answer["text_output"] == " Paris.\n\nThe"


def test_only_allowed_tokens_come(real):
    for values in (
        {"temperature": 1, "top_p": 0.9},
        {"beam_width": 3, "num_return_sequences": 3},
        {"temperature": 1, "top_k": 50, "min_p": 0.01},
    ):
        stream = stream_one(
            real, text_input="x", max_tokens=8, allowed_token_ids=[260, 282, 2], min_tokens=4, **values
        )
        ids = {token for response in stream.responses for token in response["output_ids"]}
        assert (
            ids
            and ids <= {260, 282, 2}
            and all(2 not in response["output_ids"][:3] for response in stream.responses)
        )


def test_a_search_with_fewer_answers_than_asked_for_says_so_in_finite_numbers(real):
    values = {
        "text_input": "x",
        "beam_width": 2,
        "num_return_sequences": 2,
        "allowed_token_ids": [260],
        "max_tokens": 2,
    }
    stream = stream_one(real, **values, return_log_probs=True)
    assert [response["output_ids"] for response in stream.responses] == [[260, 260], []]
    assert [response["finish_reason"] for response in stream.responses] == ["length", "stop"]
    for result in stream.results:
        assert (
            np.isfinite(result.as_numpy("cum_log_probs")).all()
            and np.isfinite(result.as_numpy("output_log_probs")).all()
        )
    status, answer = generate(real, {**values, "return_log_probs": True}, model="ensemble_unary")
    assert status == 200 and answer["sequence_length"] == [2, 0], "valid JSON too"


def test_log_probabilities_of_beams_are_the_models_own(real):
    values = {"text_input": PROMPT, "beam_width": 2, "num_return_sequences": 2, "max_tokens": 3}
    plain = stream_one(real, parameters={"logprobs": 1}, **values)
    biased = stream_one(real, parameters={"logprobs": 1}, logit_bias='{"7042": 30}', **values)
    (first, *_), *_ = ([*entry.values()] for entry in json.loads(plain.responses[0]["logprobs"])["logprobs"])
    for stream in (plain, biased):
        for response in stream.responses:
            entries = json.loads(response["logprobs"])["logprobs"]
            assert len(entries) == len(response["output_ids"])
            for entry, token in zip(entries, response["output_ids"], strict=True):
                assert next(iter(entry)) == str(token) and len(entry) == (
                    1 if entry[str(token)]["rank"] == 1 else 2
                )
    assert biased.responses[0]["output_ids"][0] == 7042
    entry = json.loads(biased.responses[0]["logprobs"])["logprobs"][0]["7042"]
    assert (
        entry["logprob"] == pytest.approx(first["logprob"], abs=1e-3)
        if plain.responses[0]["output_ids"][0] == 7042
        else entry["logprob"] < 0
    )


def test_streamed_and_whole_answers_stop_at_the_same_place(real):
    values = {
        "text_input": PROMPT,
        "max_tokens": 60,
        "min_tokens": 30,
        "temperature": 0.0,
        "stop_words": [".", "the "],
    }
    streamed, whole = stream_one(real, stream=True, **values), stream_one(real, **values)
    assert streamed.text == whole.text and len(whole.ids()) >= 30


@pytest.mark.parametrize("model", ["ensemble", "ensemble_unary"])
def test_an_empty_word_is_no_word(real, model):
    status, answer = generate(
        real,
        {"text_input": "x", "bad_words": "", "stop_words": "", "logit_bias": '{"216":100}', "max_tokens": 3},
        model=model,
    )
    assert status == 200 and answer["output_ids"] == [216] * 3
    values = {
        "embedding_bias_words": "",
        "embedding_bias_weights": -100,
        "logit_bias": '{"216":50}',
        "max_tokens": 3,
        "text_input": "x",
    }
    assert generate(real, values, model=model)[1]["output_ids"] == [216] * 3


def test_a_stop_text_may_be_a_special_token(real):
    values = {
        "text_input": "x",
        "stop_words": ["<file_sep>"],
        "logit_bias": '{"5":100}',
        "max_tokens": 6,
        "temperature": 0,
    }
    status, answer = generate(real, values, model="ensemble_unary")
    assert (
        status == 200
        and answer["finish_reason"] == "stop"
        and answer["sequence_length"] == 1
        and answer["text_output"] == ""
    )


def test_a_cancel_looks_at_no_other_field(real):
    """TensorRT-LLM's client sends the request's own id with a length of 0."""
    streams = Streams(real)
    running = streams.send("tensorrt_llm", "same", input_ids=[504], request_output_len=2000, streaming=True)
    wait_for(lambda: bool(running.responses), what="a first response")
    other = Streams(real)
    answer = other.send(
        "tensorrt_llm", "same", input_ids=[504], request_output_len=0, stop=np.array([[True]])
    )
    assert answer.done.wait(60) and not answer.errors and answer.reason == "cancelled"
    assert running.done.wait(60) and running.reason == "cancelled"
    for one in (streams, other):
        one.close()


def test_tensorrt_llms_core_model_without_streaming(real):
    result = infer_http(
        real,
        "tensorrt_llm_unary",
        input_ids=[504, 3575, 282, 4649, 314],
        request_output_len=5,
        runtime_top_k=1,
    )
    assert result.as_numpy("output_ids").tolist() == [[[7042, 30, 198, 198, 504]]] and result.as_numpy(
        "sequence_length"
    ).tolist() == [[5]]


def test_vllms_backend_says_null_where_no_log_probabilities_were_asked_for(real):
    values = {
        "text_input": np.array([PROMPT.encode()], np.object_),
        "stream": np.array([False]),
        "return_logprobs": np.array([True]),
    }
    (result,) = stream_one(real, "vllm_model", **values).results
    assert result.as_numpy("logprobs").tolist() == [b"null"]


STRINGS = [
    {"maxLength": 5},
    {"maxLength": 5, "minLength": 5},
    {"pattern": "^.{0,6}$"},
    {"pattern": r"[\t\n\"\\x]{2,8}", "maxLength": 12},
    {},
]


@pytest.mark.parametrize("rule", STRINGS, ids=str)
def test_guided_strings_are_valid_json_whatever_the_model_prefers(real, rule):
    """The model is pushed towards tabs, newlines, quotes and backslashes."""
    pushed = json.dumps({str(token): 30 for token in (197, 198, 18, 76, 29003)})
    for seed in range(4):
        schema = json.dumps(
            {"type": "array", "items": {"type": "string", **rule}, "minItems": 2, "maxItems": 2}
        )
        body = {
            "text_input": "x",
            "max_tokens": 200,
            "temperature": 1.5,
            "seed": seed,
            "logit_bias": pushed,
            **guide("json_schema", schema),
        }
        status, answer = generate(real, body, model="ensemble_unary")
        assert status == 200
        if answer["finish_reason"] == "stop":
            values = json.loads(answer["text_output"])
            assert len(values) == 2 and all(
                rule.get("minLength", 0) <= len(v) <= rule.get("maxLength", 10**6) for v in values
            )


# -- clients that leave tensorrt_llm -----------------------------------------------------------------------


@pytest.mark.parametrize("way", ["grpc", "http"])
def test_a_client_that_leaves_tensorrt_llm_frees_its_request(parrot, way):
    values = {"input_ids": START, "request_output_len": 30_000, "streaming": True, "runtime_top_k": 1}
    before = metric(parrot, "pagetide_requests_cancelled")
    if way == "grpc":
        streams = Streams(parrot)
        sent = streams.send("tensorrt_llm", "leaving", **values)
        wait_for(lambda: bool(sent.responses), what="a first response")
        streams.close(cancel=True)
    else:
        command = [
            "curl",
            "-sN",
            f"http://{parrot.address.http}/v2/models/tensorrt_llm/generate_stream",
            "-d",
            json.dumps(values),
        ]
        client = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert client.stdout.read(64)
        client.kill()
        client.communicate()
    wait_for(
        lambda: metric(parrot, "pagetide_requests_cancelled") == before + 1, what="the engine hears of it"
    )
    wait_until_idle(parrot)
