"""What clients see of streams and answers, with a model that says a known text."""

from __future__ import annotations

import json
import sys
import urllib.request

import numpy as np
import pytest
from client import Streams, generate, infer_http, stream_one
from pagetide.engine.stops import num_incomplete_bytes
from pagetide.serving.client import socket_path
from pagetide.serving.passage import passed_file
from parrot import TEXT

START = [1]
DATA = TEXT.encode()


def said(num_tokens: int) -> str:
    """What the model says in so many tokens of two bytes."""
    return (DATA * (2 * num_tokens // len(DATA) + 1))[: 2 * num_tokens].decode("utf-8", "replace")


@pytest.mark.parametrize("model", ["ensemble"])
def test_chunks_are_whole_characters_in_order_and_join_to_the_unary_text(parrot, model):
    num_tokens = 3 * len(DATA) // 2
    stream = stream_one(parrot, model, input_ids=START, max_tokens=num_tokens, temperature=0.0, stream=True)
    whole = stream_one(parrot, model, input_ids=START, max_tokens=num_tokens, temperature=0.0)
    assert stream.text == whole.text == said(num_tokens) == TEXT * 3
    assert "\ufffd" not in stream.text
    assert [r["response_index"] for r in stream.responses] == list(range(len(stream.responses)))
    assert len(stream.responses) > 1 and len(whole.responses) == 1
    assert stream.ids() == whole.ids() and len(stream.ids()) == num_tokens
    assert [r["finish_reason"] for r in stream.responses[:-1]] == [""] * (len(stream.responses) - 1)
    assert stream.reason == whole.reason == "length"
    assert all(r["sequence_length"] == len(r["output_ids"]) for r in stream.responses)


def test_an_answer_that_ends_inside_a_character_shows_a_replacement(parrot):
    cut = next(n for n in range(1, 20) if num_incomplete_bytes(DATA[: 2 * n]))
    assert stream_one(parrot, input_ids=START, max_tokens=cut, temperature=0.0, stream=True).text == said(cut)


@pytest.mark.parametrize("stop", ["引夕", "🌊西", "🐚", "雨", "xyz"])
@pytest.mark.parametrize("streams", [True, False])
def test_stop_words_are_matched_on_text_across_tokens_and_cut_off(parrot, stop, streams):
    stream = stream_one(
        parrot, input_ids=START, max_tokens=40, temperature=0.0, stream=streams, stop_words=[stop, ""]
    )
    expected = said(40).split(stop)[0]
    assert (stream.text, stream.reason) == (expected, "stop" if stop in said(40) else "length")


def test_end_id_min_tokens_and_ignore_eos(parrot):
    end = 5
    assert (
        len(stream_one(parrot, input_ids=START, max_tokens=30, temperature=0.0, end_id=end).ids()) == end - 1
    )
    assert stream_one(parrot, input_ids=START, max_tokens=30, temperature=0.0, end_id=end).reason == "stop"
    assert (
        len(
            stream_one(
                parrot, input_ids=START, max_tokens=30, temperature=0.0, end_id=end, ignore_eos=True
            ).ids()
        )
        == 30
    )
    late = stream_one(parrot, input_ids=START, max_tokens=30, temperature=0.0, end_id=end, min_tokens=10)
    assert end not in late.ids()[:10]


def test_samples_have_their_own_index_and_one_final_response(parrot):
    stream = stream_one(
        parrot, input_ids=START, max_tokens=9, temperature=0.0, num_return_sequences=4, stream=True
    )
    for index in range(4):
        mine = [r for r in stream.responses if r["sequence_index"] == index]
        assert "".join(r["text_output"] for r in mine) == said(9)
        assert [r["response_index"] for r in mine] == list(range(len(mine)))
        assert [r["finish_reason"] for r in mine][-1] == "length"


def test_several_prompts_in_one_request(parrot):
    stream = stream_one(parrot, input_ids=[[1, 2], [1, 3]], max_tokens=[[3], [5]], temperature=[[0.0], [0.0]])
    by_batch = {r["batch_index"]: r["output_ids"] for r in stream.responses}
    assert by_batch == {0: [3, 4, 5], 1: [4, 5, 6, 7, 8]}


def test_unary_models_answer_all_samples_and_prompts_at_once(parrot):
    result = infer_http(
        parrot,
        "ensemble_unary",
        input_ids=[[1, 2], [1, 3]],
        max_tokens=[[3], [5]],
        temperature=[[0.0]] * 2,
        num_return_sequences=[[2]] * 2,
    )
    assert result.as_numpy("batch_index").ravel().tolist() == [0, 0, 1, 1]
    assert result.as_numpy("sequence_index").ravel().tolist() == [0, 1, 0, 1]
    assert result.as_numpy("sequence_length").ravel().tolist() == [3, 3, 5, 5]
    assert result.as_numpy("output_ids")[3, 0].tolist() == [4, 5, 6, 7, 8]
    assert result.as_numpy("text_output").shape == (4,)
    assert result.as_numpy("finish_reason").tolist() == [b"length"] * 4


def test_llm_by_itself_takes_and_gives_token_ids(parrot):
    stream = stream_one(parrot, "llm", input_ids=[1, 2], max_tokens=4, temperature=0.0, stream=True)
    assert stream.ids() == [3, 4, 5, 6] and "text_output" not in stream.responses[0]
    padded = stream_one(
        parrot,
        "llm",
        input_ids=[[1, 2, 0], [1, 2, 3]],
        input_lengths=[[2], [3]],
        max_tokens=[[1], [1]],
        temperature=[[0.0]] * 2,
    )
    assert sorted((r["batch_index"], r["output_ids"]) for r in padded.responses) == [(0, [3]), (1, [4])]
    unary = infer_http(parrot, "llm_unary", input_ids=[1, 2], max_tokens=4, temperature=0.0)
    assert unary.as_numpy("output_ids").tolist() == [[[3, 4, 5, 6]]]


def test_counts_are_there_if_and_only_if_asked_for(parrot):
    flags = {
        "return_num_input_tokens": True,
        "return_num_output_tokens": True,
        "return_num_cached_tokens": True,
    }
    plain = stream_one(parrot, input_ids=START * 40, max_tokens=6, temperature=0.0, stream=True)
    assert not {"num_input_tokens", "num_output_tokens", "num_cached_tokens"} & set(plain.responses[0])
    counted = stream_one(parrot, input_ids=START * 40, max_tokens=6, temperature=0.0, stream=True, **flags)
    assert {r["num_input_tokens"] for r in counted.responses} == {40}
    assert sum(r["num_output_tokens"] for r in counted.responses) == 6
    assert {r["num_cached_tokens"] for r in counted.responses} == {32}, (
        "the first request has filled two blocks of 16"
    )


def test_the_same_over_http_generate_and_generate_stream(parrot):
    body = {"input_ids": [1, 2, 3], "max_tokens": 12, "temperature": 0}
    status, answer = generate(parrot, body)
    assert status == 200 and answer["text_output"] == DATA[4:28].decode("utf-8", "replace")
    url = f"http://{parrot.address.http}/v2/models/ensemble/generate_stream"
    with urllib.request.urlopen(
        urllib.request.Request(url, json.dumps({**body, "stream": True}).encode()), timeout=60
    ) as stream:
        events = [json.loads(line[6:]) for line in stream if line.startswith(b"data: ")]
    assert "".join(event["text_output"] for event in events) == answer["text_output"]
    assert events[-1]["finish_reason"] == "length" and len(events) > 1


def test_request_parameters_and_sampling_parameters_reach_the_engine(parrot):
    assert (
        generate(
            parrot,
            {
                "text_input": "<start>",
                "max_tokens": 4,
                "temperature": 0,
                "n": 1,
                "parameters": {"min_tokens": 2},
            },
        )[0]
        == 200
    )
    status, answer = generate(
        parrot, {"input_ids": [1, 2], "sampling_parameters": '{"max_tokens": "3", "temperature": 0}'}
    )
    assert status == 200 and answer["output_ids"] == [3, 4, 5]
    assert stream_one(parrot, parameters={"max_tokens": 2}, input_ids=START, temperature=0.0).ids() == [2, 3]


def test_the_prompt_stands_in_front_if_asked_for_and_never_in_streams(parrot):
    body = {"text_input": "波引", "max_tokens": 3, "temperature": 0, "exclude_input_in_output": False}
    status, answer = generate(parrot, body)
    assert status == 200 and answer["text_output"].startswith("波引")
    plain = generate(parrot, {**body, "exclude_input_in_output": True})[1]["text_output"]
    assert answer["text_output"] == "波引" + plain


def test_many_streams_at_once_all_say_the_same(parrot):
    streams = Streams(parrot)
    sent = [
        streams.send("ensemble", f"s{i}", input_ids=START, max_tokens=100, temperature=0.0, stream=True)
        for i in range(100)
    ]
    for stream in sent:
        assert stream.done.wait(60) and not stream.errors
        assert stream.text == said(100)
        assert [r["response_index"] for r in stream.responses] == list(range(len(stream.responses)))
    streams.close()


def test_postprocessing_tells_llm_how_far_it_is(parrot):
    def passed() -> int:
        return int.from_bytes(passed_file(socket_path(parrot.pid)).read_bytes(), sys.byteorder)

    before, num_chunks = passed(), 0
    for model, stream in {"ensemble": {"stream": True}, "tensorrt_llm": {"streaming": True}}.items():
        length = {"request_output_len" if model == "tensorrt_llm" else "max_tokens": 64}
        for _ in range(8):
            answer = stream_one(parrot, model, input_ids=START, **length, **stream)
            assert not answer.errors, answer.errors
            num_chunks += len(answer.responses)
        assert num_chunks >= 16 and abs(passed() - before - num_chunks) < 8
    assert passed() >> 32 == before >> 32 > 0


def test_a_seed_gives_the_same_tokens_alone_and_in_company(real):
    values = {"text_input": "Once upon a time", "max_tokens": 12, "temperature": 1.0, "seed": 7}
    alone = stream_one(real, **values).ids()
    streams = Streams(real)
    others = [
        streams.send("ensemble", f"o{i}", text_input="Other", max_tokens=30, temperature=1.0)
        for i in range(8)
    ]
    again = streams.send("ensemble", "again", **values)
    assert again.done.wait(60) and again.ids() == alone
    assert all(o.done.wait(60) for o in others)
    assert len({tuple(o.ids()) for o in others}) > 1, "without a seed every request draws its own"
    streams.close()


def test_chat_messages_are_rendered_by_the_models_template(real):
    messages = json.dumps(
        [{"role": "user", "content": "What is the capital of France? Explain in two sentences."}]
    )
    stream = stream_one(real, messages=messages, max_tokens=30, temperature=0.0, stream=True)
    assert stream.text == "The capital of France is Paris." and stream.reason == "stop"


def test_outputs_have_the_contracts_shapes(parrot):
    result = infer_http(parrot, "ensemble_unary", input_ids=START, max_tokens=3, temperature=0.0)
    shapes = {
        name: result.as_numpy(name).shape
        for name in ("text_output", "finish_reason", "sequence_index", "output_ids", "sequence_length")
    }
    assert shapes == {
        "text_output": (1,),
        "finish_reason": (1,),
        "sequence_index": (1, 1),
        "output_ids": (1, 1, 3),
        "sequence_length": (1, 1),
    }
    assert result.as_numpy("output_ids").dtype == np.int32
