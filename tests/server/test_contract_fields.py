"""The request contract on the real server: every field by every way in, every output if and only if asked
for, the faces of other backends.
"""

from __future__ import annotations

import json
import re
import urllib.request
from typing import Any

import jsonschema
import numpy as np
import pytest
import tritonclient.grpc as grpc
from client import Streams, generate, infer_http, stream_one, wait_for, wait_until_idle
from test_streams import START, said

PROMPT = "The capital of France is"
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["n"],
    "additionalProperties": False,
}


def test_tensorrt_llms_clients_work_unchanged(real):
    """The body of its documentation, and a gRPC stream with the tensors that its client always sends."""
    status, answer = generate(
        real, {"text_input": "What is machine learning?", "max_tokens": 20, "bad_words": "", "stop_words": ""}
    )
    # What is sampled may be an end at once.
    assert status == 200 and isinstance(answer["text_output"], str) and answer["model_name"] == "ensemble"
    stream = stream_one(
        real,
        text_input=PROMPT,
        max_tokens=6,
        bad_words=[""],
        stop_words=[""],
        top_k=1,
        top_p=0.0,
        temperature=1.0,
        length_penalty=1.0,
        repetition_penalty=1.0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        random_seed=0,
        stream=True,
        beam_width=1,
        end_id=2,
        pad_id=2,
        return_log_probs=True,
        return_context_logits=False,
        return_generation_logits=False,
    )
    assert not stream.errors and stream.text.startswith(" Paris")
    assert sum(result.as_numpy("output_log_probs").size for result in stream.results) == 6


def test_vllms_http_bodies_work_unchanged(real):
    body = {
        "text_input": PROMPT,
        "parameters": {"stream": False, "temperature": 0, "exclude_input_in_output": True},
    }
    status, answer = generate(real, body, model="vllm_model")
    assert status == 200 and len(answer["text_output"]) > 20
    body = {
        "text_input": PROMPT,
        "sampling_parameters": json.dumps({"temperature": "0", "max_tokens": "4", "stop": ["\n"]}),
    }
    status, answer = generate(real, body, model="vllm_model")
    assert status == 200 and answer["text_output"] == PROMPT + " Paris.", "the prompt stands in front"


# -- log-probabilities and reports -------------------------------------------------------------------------


def test_log_probabilities_over_the_wire(real):
    flags = {"return_log_probs": True, "prompt_logprobs": 1, "stream": True}
    stream = stream_one(
        real, parameters={"logprobs": 2}, text_input=PROMPT, max_tokens=8, temperature=0.0, **flags
    )
    by_token = [
        p for result in stream.results for p in result.as_numpy("output_log_probs").reshape(-1).tolist()
    ]
    assert len(by_token) == 8 and all(p <= 0 for p in by_token)
    assert stream.results[-1].as_numpy("cum_log_probs").item() == pytest.approx(sum(by_token), abs=1e-4)
    found = [json.loads(response["logprobs"]) for response in stream.responses]
    entries = [entry for one in found for entry in one["logprobs"]]
    for entry, token, p in zip(entries, stream.ids(), by_token, strict=True):
        (first, own), *others = entry.items()
        assert (
            int(first) == token
            and own["rank"] == 1
            and own["logprob"] == pytest.approx(p, abs=1e-5)
            and len(others) == 1
        )
    assert "".join(next(iter(entry.values()))["decoded_token"] for entry in entries) == stream.text
    prompt = found[0]["prompt_logprobs"]
    assert prompt[0] is None and all("prompt_logprobs" not in one for one in found[1:])
    assert [next(iter(entry.values()))["decoded_token"] for entry in prompt[1:]] == [
        " capital",
        " of",
        " France",
        " is",
    ]


def test_outputs_are_there_if_and_only_if_asked_for(real):
    always = {
        "text_output",
        "finish_reason",
        "sequence_index",
        "batch_index",
        "response_index",
        "output_ids",
        "sequence_length",
    }
    asked = {
        "return_log_probs": {"cum_log_probs", "output_log_probs"},
        "return_num_input_tokens": {"num_input_tokens"},
        "return_num_output_tokens": {"num_output_tokens"},
        "return_num_cached_tokens": {"num_cached_tokens"},
        "return_context_logits": {"context_logits"},
        "return_generation_logits": {"generation_logits"},
        "return_perf_metrics": {
            "kv_cache_reused_blocks", "kv_cache_alloc_new_blocks", "kv_cache_alloc_total_blocks",
            "arrival_time_ns", "first_scheduled_time_ns", "first_token_time_ns", "last_token_time_ns",
            "acceptance_rate", "total_accepted_draft_tokens", "total_draft_tokens",
        },
    }  # fmt: skip
    assert set(stream_one(real, text_input=PROMPT, max_tokens=2).responses[0]) == always
    for flag, outputs in asked.items():
        for model in ("ensemble", "ensemble_unary"):
            stream = stream_one(real, model, text_input=PROMPT, max_tokens=2, **{flag: True})
            assert not stream.errors and set(stream.responses[0]) == always | outputs, flag


def test_perf_metrics_tell_times_in_order_and_blocks(real):
    prompt = "One " * 100
    first, second = (
        stream_one(real, text_input=prompt, max_tokens=3, return_perf_metrics=True).responses[-1]
        for _ in range(2)
    )
    for response in (first, second):
        times = [
            response[f"{name}_time_ns"]
            for name in ("arrival", "first_scheduled", "first_token", "last_token")
        ]
        assert times == sorted(times) and times[0] > 0
        assert (
            response["kv_cache_alloc_total_blocks"]
            == response["kv_cache_reused_blocks"] + response["kv_cache_alloc_new_blocks"]
            == 7
        )
    assert (first["kv_cache_reused_blocks"], second["kv_cache_reused_blocks"]) == (0, 6)


def test_logits_have_the_shapes_of_prompt_and_answer(real):
    flags = {"return_context_logits": True, "return_generation_logits": True}
    (result,) = stream_one(real, text_input=PROMPT, max_tokens=3, temperature=0.0, **flags).results
    context, generation = result.as_numpy("context_logits"), result.as_numpy("generation_logits")
    assert (context.shape, generation.shape) == ((1, 5, 49152), (1, 1, 3, 49152))
    assert generation[0, 0].argmax(-1).tolist() == result.as_numpy("output_ids").reshape(-1).tolist()
    np.testing.assert_allclose(context[0, -1], generation[0, 0, 0], atol=1e-4)


def test_logits_are_refused_where_the_server_does_not_allow_them(parrot):
    assert (
        "the setting allow_logits is false"
        in stream_one(parrot, input_ids=START, max_tokens=1, return_context_logits=True).errors[0]
    )


# -- guides ------------------------------------------------------------------------------------------------


def test_guides_by_tensors_by_json_and_over_http(real):
    guide = {"guided_decoding_guide_type": "json_schema", "guided_decoding_guide": json.dumps(SCHEMA)}
    streamed = stream_one(real, text_input=PROMPT, max_tokens=30, temperature=1.0, stream=True, **guide)
    texts = [
        streamed.text,
        generate(real, {"text_input": PROMPT, "max_tokens": 30, **guide})[1]["text_output"],
    ]
    for name in ("guided_decoding", "structured_outputs"):
        parameters = json.dumps({name: {"json": SCHEMA}, "max_tokens": 30})
        texts.append(
            generate(real, {"text_input": PROMPT, "sampling_parameters": parameters})[1]["text_output"]
        )
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMA)


def test_an_ungrammatical_grammar_is_told_to_its_request_only(real):
    streams = Streams(real)
    others = [
        streams.send(
            "ensemble",
            f"g{i}",
            text_input=PROMPT,
            max_tokens=40,
            temperature=0.0,
            ignore_eos=True,
            stream=True,
        )
        for i in range(4)
    ]
    for kind, guide in (
        ("regex", "[a-"),
        ("ebnf_grammar", "root ::= nothing"),
        ("json_schema", '{"type": "nope"}'),
    ):
        bad = stream_one(
            real,
            text_input=PROMPT,
            max_tokens=5,
            guided_decoding_guide_type=kind,
            guided_decoding_guide=guide,
        )
        assert (
            len(bad.errors) == 1
            and f"guided_decoding_guide is no valid {kind}" in bad.errors[0]
            and not bad.responses
        )
        status, answer = generate(
            real, {"text_input": PROMPT, "guided_decoding_guide_type": kind, "guided_decoding_guide": guide}
        )
        assert status == 400 and "is no valid" in answer["error"]
    for stream in others:
        assert stream.done.wait(60) and not stream.errors and len(stream.ids()) == 40
    streams.close()


# -- several answers, several prompts ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "rule",
    [
        {"num_return_sequences": 3, "temperature": 1.0},
        {"beam_width": 3, "num_return_sequences": 3},
        {"best_of": 4},
    ],
)
def test_several_answers_come_apart_or_in_one_response(real, rule):
    count = rule.get("num_return_sequences", 1)
    streams = Streams(real)
    apart = streams.send("ensemble", "apart", text_input=PROMPT, max_tokens=5, seed=3, **rule)
    assert apart.done.wait(60)
    streams.close()
    together = infer_http(real, "ensemble_unary", text_input=PROMPT, max_tokens=5, seed=3, **rule)
    assert together.as_numpy("text_output").shape == (count,)
    texts = {response["sequence_index"]: response["text_output"] for response in apart.responses}
    assert [text.decode() for text in together.as_numpy("text_output")] == [texts[i] for i in range(count)]
    assert len(set(texts.values())) == count


def test_prompts_of_one_request_have_parameters_of_their_own(real):
    values = {
        "text_input": [[PROMPT], ["Water boils at"], [PROMPT]],
        "max_tokens": [[3], [5], [4]],
        "temperature": [[0.0]] * 3,
        "bad_words": [[""], [""], ["Paris"]],
        "return_num_input_tokens": [[True]] * 3,
    }
    stream = stream_one(real, **values)
    assert sorted((r["batch_index"], r["sequence_length"]) for r in stream.responses) == [
        (0, 3),
        (1, 5),
        (2, 4),
    ]
    unary = infer_http(real, "ensemble_unary", **values)
    assert unary.as_numpy("batch_index").ravel().tolist() == [0, 1, 2]
    assert unary.as_numpy("num_input_tokens").ravel().tolist() == [5, 3, 5]
    texts = [text.decode() for text in unary.as_numpy("text_output")]
    assert texts == [r["text_output"] for r in sorted(stream.responses, key=lambda r: r["batch_index"])]
    assert "Paris" in texts[0] and "Paris" not in texts[2]


# -- lifetimes ---------------------------------------------------------------------------------------------


def test_a_request_whose_time_is_up_gets_what_it_has(parrot):
    late = stream_one(parrot, input_ids=START, max_tokens=30000, temperature=0.0, stream=True, timeout_ms=600)
    assert late.reason == "timeout" and len(late.ids()) < 30000
    assert late.text == said(len(late.ids()))[: len(late.text)]
    wait_until_idle(parrot)


def test_the_requests_own_timeout_counts_too(parrot):
    for model in ("ensemble", "llm"):
        streams = Streams(parrot)
        stream = streams.send(
            model, "own", timeout_us=400_000, input_ids=START, max_tokens=30000, temperature=0.0, stream=True
        )
        assert stream.done.wait(60) and stream.reason == "timeout"
        streams.close()


# -- faces -------------------------------------------------------------------------------------------------


def vllm_request(server: Any, values: dict[str, np.ndarray]) -> list[grpc.InferResult]:
    """One-dimensional tensors, as the vLLM backend's client sends them."""
    stream = stream_one(server, "vllm_model", **values)
    assert not stream.errors, stream.errors
    return stream.results


def texts(*values: str) -> np.ndarray:
    return np.array([value.encode() for value in values], np.object_)


VLLM_FLAGS = {
    f"return_{name}": np.array([True])
    for name in ("finish_reason", "cumulative_logprob", "logprobs", "num_input_tokens", "num_output_tokens")
}


def test_vllms_grpc_clients_work_unchanged(real):
    parameters = texts(json.dumps({"temperature": 0, "max_tokens": 5, "logprobs": 1, "n": 1}))
    (result,) = vllm_request(
        real,
        {
            "text_input": texts(PROMPT),
            "stream": np.array([False]),
            "sampling_parameters": parameters,
            **VLLM_FLAGS,
        },
    )
    assert result.as_numpy("text_output").tolist() == [f"{PROMPT} Paris.\n\nThe".encode()]
    assert result.as_numpy("finish_reason").tolist() == [b"length"]
    assert (result.as_numpy("num_input_tokens").dtype, result.as_numpy("num_output_tokens").dtype) == (
        np.uint32,
        np.uint32,
    )
    assert (result.as_numpy("num_input_tokens").tolist(), result.as_numpy("num_output_tokens").tolist()) == (
        [5],
        [5],
    )
    entries = json.loads(result.as_numpy("logprobs")[0])
    assert len(entries) == 5 and all(
        set(value) == {"logprob", "rank", "decoded_token"} for entry in entries for value in entry.values()
    )
    total = sum(next(iter(entry.values()))["logprob"] for entry in entries)
    assert result.as_numpy("cumulative_logprob").tolist() == pytest.approx([total], abs=1e-4)


def test_each_response_of_a_vllm_stream_has_the_log_probability_so_far_of_every_answer(real):
    parameters = texts(json.dumps({"temperature": 1, "seed": 3, "max_tokens": 6, "n": 2, "ignore_eos": True}))
    inputs = {"text_input": texts(PROMPT), "stream": np.array([True]), "sampling_parameters": parameters}
    results = vllm_request(real, {**inputs, **VLLM_FLAGS})
    so_far = np.array([result.as_numpy("cumulative_logprob") for result in results])
    assert (so_far[-1] < 0).all() and (np.diff(so_far, axis=0) <= 0).all()


def test_the_log_probabilities_of_a_prompt_of_one_token_are_there(real):
    stream = stream_one(real, input_ids=[500], max_tokens=1, parameters={"prompt_logprobs": 1})
    assert json.loads(stream.results[0].as_numpy("logprobs")[0])["prompt_logprobs"] == [None]


def test_vllms_streams_say_none_until_the_end_and_its_defaults_hold(real):
    parameters = texts('{"temperature": 0}')
    results = vllm_request(
        real,
        {
            "text_input": texts(PROMPT),
            "stream": np.array([True]),
            "sampling_parameters": parameters,
            **VLLM_FLAGS,
        },
    )
    reasons = [result.as_numpy("finish_reason").tolist()[0] for result in results]
    assert len(results) > 1 and set(reasons[:-1]) == {b"None"} and reasons[-1] == b"length"
    assert sum(int(result.as_numpy("num_output_tokens")[0]) for result in results) == 16
    assert not b"".join(result.as_numpy("text_output")[0] for result in results).startswith(PROMPT.encode())


@pytest.mark.parametrize("stream", [False, True])
def test_vllms_samples_come_in_one_response(real, stream):
    parameters = texts('{"n": 3, "seed": 5, "max_tokens": 6}')
    values = {
        "text_input": texts(PROMPT),
        "stream": np.array([stream]),
        "sampling_parameters": parameters,
        "exclude_input_in_output": np.array([True]),
    }
    results = vllm_request(real, values | VLLM_FLAGS)
    assert (
        all(result.as_numpy("text_output").shape == (3,) for result in results)
        and (len(results) == 1) != stream
    )
    joined = [b"".join(result.as_numpy("text_output")[i] for result in results).decode() for i in range(3)]
    own = infer_http(real, "ensemble_unary", text_input=PROMPT, num_return_sequences=3, seed=5, max_tokens=6)
    assert joined == [text.decode() for text in own.as_numpy("text_output")]
    assert results[-1].as_numpy("finish_reason").tolist() == [b"length"] * 3


def test_tensorrt_llms_core_model_under_its_own_names(parrot):
    values = {
        "input_ids": [1, 2, 3],
        "input_lengths": 3,
        "request_output_len": 4,
        "runtime_top_k": 1,
        "runtime_top_p": 0.0,
        "end_id": 0,
        "pad_id": 0,
    }
    stream = stream_one(
        parrot,
        "tensorrt_llm",
        streaming=True,
        temperature=1.0,
        len_penalty=1.0,
        repetition_penalty=1.0,
        **values,
    )
    assert not stream.errors and stream.ids() == [4, 5, 6, 7] and "text_output" not in stream.responses[0]
    assert [result.as_numpy("output_ids").ndim for result in stream.results] == [3] * len(stream.results)
    assert sum(result.as_numpy("sequence_length").item() for result in stream.results) == 4


def test_tensorrt_llms_core_model_is_cancelled_by_its_stop(parrot):
    streams = Streams(parrot)
    running = streams.send(
        "tensorrt_llm", "mine", input_ids=[1], request_output_len=30000, streaming=True, runtime_top_k=1
    )
    wait_for(lambda: bool(running.responses), 30, "a first response")
    other = Streams(parrot)
    other.send("tensorrt_llm", "mine", input_ids=[1], stop=np.array([[True]]))
    assert running.done.wait(60) and running.reason == "cancelled"
    for one in (streams, other):
        one.close()


def test_steps_can_be_chained_by_hand_under_tensorrt_llms_names(real):
    before = infer_http(real, "preprocessing", QUERY=PROMPT, REQUEST_OUTPUT_LEN=4)
    ids, lengths = before.as_numpy("INPUT_ID"), before.as_numpy("REQUEST_INPUT_LEN")
    core = stream_one(
        real, "tensorrt_llm", input_ids=ids, input_lengths=lengths, request_output_len=4, runtime_top_k=1
    ).results[0]
    after = infer_http(
        real,
        "postprocessing",
        TOKENS_BATCH=core.as_numpy("output_ids"),
        SEQUENCE_LENGTH=core.as_numpy("sequence_length"),
    )
    assert after.as_numpy("OUTPUT").tolist() == [b" Paris.\n\n"]


@pytest.mark.parametrize(
    "model", ["ensemble", "ensemble_unary", "vllm_model", "tensorrt_llm", "tensorrt_llm_unary"]
)
def test_a_client_may_ask_for_any_one_output(parrot, model):
    """Triton leaves out the steps that an answer does not need."""
    text = {"text_input": PROMPT, "max_tokens": 3, "temperature": 0, "stream": True}
    vllm = {
        "text_input": np.array([PROMPT.encode()], object),
        "sampling_parameters": np.array([json.dumps({"max_tokens": 3, "temperature": 0}).encode()], object),
    }
    core = {"input_ids": [1], "request_output_len": 3, "runtime_top_k": 1, "streaming": True}
    values = {"ensemble": text, "ensemble_unary": text, "vllm_model": vllm}.get(model, core)
    streams = Streams(parrot)
    always = {
        "text_output",
        "output_ids",
        "sequence_length",
        "batch_index",
        "sequence_index",
        "response_index",
    }
    for name in [output.name for output in streams.client.get_model_config(model).config.output]:
        stream = streams.send(model, name, outputs=[name], **values)
        assert stream.done.wait(60), f"{model} does not answer who asks for {name} only"
        assert not stream.errors, name
        assert name not in always or any(name in response for response in stream.responses), name
    streams.close()


# -- metrics -----------------------------------------------------------------------------------------------


def scrape(server: Any) -> dict[str, float]:
    """Our metrics, by name and labels other than the model."""
    with urllib.request.urlopen(f"http://{server.address.metrics}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    found = {}
    for line in lines:
        if match := re.match(r"((?:pagetide|vllm|nv_trt_llm)[\w:]*)\{(.*)\} (\S+)$", line):
            labels = ",".join(
                label for label in match[2].split(",") if label and not label.startswith("model=")
            )
            found[match[1] + (f"{{{labels}}}" if labels else "")] = float(match[3])
    return found


def test_metrics_are_what_the_clients_counted(real):
    wait_until_idle(real)
    before = scrape(real)
    streams = Streams(real)
    flags = {"return_num_input_tokens": True, "return_num_cached_tokens": True}
    sent = [
        streams.send(
            "ensemble",
            f"m{i}",
            text_input=f"{PROMPT} {i % 3}" + " x" * (5 * i),
            max_tokens=5 + i,
            ignore_eos=True,
            stream=True,
            **flags,
        )
        for i in range(12)
    ]
    late = streams.send(
        "ensemble", "late", text_input=PROMPT, max_tokens=1500, ignore_eos=True, timeout_ms=1500, **flags
    )
    for stream in (*sent, late):
        assert stream.done.wait(120)
    streams.close()
    bad = stream_one(real, text_input=PROMPT, guided_decoding_guide_type="regex", guided_decoding_guide="[")
    assert bad.errors
    wait_until_idle(real)

    def changed(name: str) -> float:
        return scrape(real)[name] - before[name]

    everyone = [*sent, late]
    num_tokens = sum(len(stream.ids()) for stream in everyone)
    wait_for(lambda: changed("pagetide_generated_tokens") == num_tokens, what=f"{num_tokens} tokens")
    assert changed("pagetide_prompt_tokens") == sum(
        stream.responses[0]["num_input_tokens"] for stream in everyone
    )
    assert changed("pagetide_cached_prompt_tokens") == sum(
        stream.responses[0]["num_cached_tokens"] for stream in everyone
    )
    assert (
        changed("pagetide_requests_timed_out"),
        changed("pagetide_requests_failed"),
        changed("pagetide_requests_cancelled"),
    ) == (1, 1, 0)
    for name in (
        "time_to_first_token_seconds",
        "request_seconds",
        "queue_seconds",
        "time_per_output_token_seconds",
    ):
        assert changed(f"pagetide_{name}_count") == 13, name
    num_gaps = sum(len(stream.responses) - 1 for stream in everyone)
    wait_for(
        lambda: changed("pagetide_chunk_gap_seconds_count") == num_gaps,
        what=f"{num_gaps} gaps between chunks",
    )
    assert changed("vllm:inter_token_latency_seconds_count") == num_gaps
    assert changed("pagetide_step_tokens_count") == changed("pagetide_step_sequences_count") > 16
    computed = changed("pagetide_prompt_tokens") - changed("pagetide_cached_prompt_tokens") + num_tokens
    assert changed("pagetide_step_tokens_sum") >= computed - 13
    for ours, theirs in (
        ("generated_tokens", "generation_tokens_total"),
        ("time_to_first_token_seconds_count", "time_to_first_token_seconds_count"),
    ):
        assert changed(f"pagetide_{ours}") == changed(f"vllm:{theirs}")
    gauges = scrape(real)
    assert gauges["pagetide_kv_blocks_total"] == 600 and gauges["pagetide_kv_blocks_cached"] > 0
