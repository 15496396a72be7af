"""What requests may say, whichever way they say it; one case for each row of the table and each rule."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pagetide.serving.contract import FIELDS, MAX_STOPS, check_params, check_request, parse, tensor_fields
from pagetide.types import Request, RequestError, SamplingParams


def text(*values: str) -> np.ndarray:
    return np.array([[v.encode()] for v in values], dtype=np.object_)


PROMPT = {"text_input": text("hello")}


def parse_one(**parameters):
    return parse(PROMPT, parameters)[0]


@pytest.mark.parametrize("field", [f for f in FIELDS if f.low is not None], ids=lambda f: f.name)
def test_a_value_out_of_range_names_field_value_and_range(field):
    for wrong in (field.low - 1, field.high + 1 if field.high <= 1 else field.high * 2):
        with pytest.raises(RequestError, match=rf"{field.name} is {wrong}(\.0)?, must be from {field.low} to "):
            parse_one(**{field.name: wrong})


@pytest.mark.parametrize("name, field", [(n, f) for n, f in tensor_fields() if f.attribute and not f.is_list])
def test_a_tensor_a_parameter_and_json_mean_the_same(name, field):
    value = True if field.dtype == "BOOL" else 1
    kind = {"BOOL": np.bool_, "INT32": np.int32, "FP32": np.float32, "UINT64": np.uint64}[field.dtype]
    by_tensor = parse({**PROMPT, name: np.array([[value]], kind)}, {})[0].params
    assert getattr(by_tensor, field.attribute) == value
    assert by_tensor == parse_one(**{name: value}).params
    assert by_tensor == parse({**PROMPT, "sampling_parameters": text(json.dumps({name: str(value).lower()}))}, {})[0].params


def test_a_tensor_goes_before_sampling_parameters_before_a_parameter():
    tensors = {**PROMPT, "sampling_parameters": text('{"top_k": 2, "min_tokens": 2}'), "top_k": np.array([[1]], np.int32)}
    params = parse(tensors, {"top_k": 3, "min_tokens": 3, "min_p": 0.5})[0].params
    assert (params.top_k, params.min_tokens, params.min_p) == (1, 2, 0.5)


def test_an_unknown_parameter_offers_the_nearest_names():
    with pytest.raises(RequestError, match="no parameter called 'temprature'; did you mean temperature"):
        parse_one(temprature=1)
    with pytest.raises(RequestError, match="no field of sampling_parameters called 'zzz'; known are"):
        parse({**PROMPT, "sampling_parameters": text('{"zzz": 1}')}, {})


def test_some_names_are_ignored():
    assert parse_one(Streaming=True, binary_data_output=True, triton_enable_empty_final_response=True).params == SamplingParams()


def test_top_p_zero_counts_as_not_given():
    assert parse_one(top_p=0).params.top_p == 1.0


@pytest.mark.parametrize("tensors", [{}, {**PROMPT, "input_ids": np.array([[1]], np.int32)}])
def test_exactly_one_prompt(tensors):
    with pytest.raises(RequestError, match="exactly one of text_input, messages, input_ids"):
        parse(tensors or {"top_k": np.array([[1]], np.int32)}, {})


def test_the_same_field_under_two_names_is_refused():
    with pytest.raises(RequestError, match="min_tokens is given twice, as min_tokens and as min_length"):
        parse({**PROMPT, "min_tokens": np.array([[1]], np.int32), "min_length": np.array([[1]], np.int32)}, {})


def test_several_prompts_have_their_own_values():
    tensors = {"text_input": text("a", "b"), "top_k": np.array([[1], [2]], np.int32), "stop": np.array([[b"x", b""], [b"y", b"z"]], np.object_)}
    first, second = parse(tensors, {"seed": 5})
    assert (first.text, first.params.top_k, first.params.stop_texts, first.params.seed) == ("a", 1, ("x",), 5)
    assert (second.text, second.params.top_k, second.params.stop_texts) == ("b", 2, ("y", "z"))
    with pytest.raises(RequestError, match="batch sizes"):
        parse({**tensors, "min_p": np.array([[0.1]], np.float32)}, {})


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({"text_input": np.array([[b"\xff"]], np.object_)}, "text_input is not valid UTF-8"),
        ({"messages": text("nonsense")}, "messages is not valid JSON"),
        ({"messages": text("[]")}, "messages must be a JSON list of at least one object"),
        ({"messages": text("[1]")}, "messages must be a JSON list of at least one object"),
        ({**PROMPT, "sampling_parameters": text("[1]")}, "sampling_parameters is a JSON list, must be an object"),
        ({**PROMPT, "temperature": np.array([[np.nan]], np.float32)}, "temperature is nan, must be a finite number"),
        ({**PROMPT, "chat_template_kwargs": text("3")}, "chat_template_kwargs is a JSON int, must be an object"),
    ],
)
def test_bad_values_have_one_clear_sentence(tensors, message):
    with pytest.raises(RequestError, match=message):
        parse(tensors, {})


@pytest.mark.parametrize("name, wrong", [("max_tokens", "many"), ("max_tokens", 1.5), ("temperature", "warm"), ("stream", "maybe"), ("stop", 3)])
def test_wrong_types_are_told(name, wrong):
    with pytest.raises(RequestError, match=f"{name} is {wrong!r}, must be"):
        parse_one(**{name: wrong})


def test_min_tokens_must_not_be_above_max_tokens():
    with pytest.raises(RequestError, match="min_tokens is 5, must be at most max_tokens, which is 4"):
        check_params(SamplingParams(min_tokens=5, max_tokens=4))


def test_the_number_of_stop_texts_is_bounded():
    with pytest.raises(RequestError, match="stop_words has 65 texts"):
        check_params(SamplingParams(stop=("x",) * (MAX_STOPS + 1)))


@pytest.mark.parametrize(
    "ids, params, message",
    [
        ([], {}, "the prompt is empty"),
        ([1] * 16, {}, "the prompt has 16 tokens, must have at most 15"),
        ([1, 100], {}, "input_ids has the token id 100, must be from 0 to 99"),
        ([-1], {}, "input_ids has the token id -1"),
        ([1], {"n": 5}, "num_return_sequences is 5, must be at most 4"),
        ([1], {"end_id": 100}, "end_id is 100, must be from -1 to 99"),
    ],
)
def test_requests_that_the_model_cannot_run_are_refused(ids, params, message):
    with pytest.raises(RequestError, match=message):
        check_request(Request(number=1, prompt_ids=ids, params=SamplingParams(**params)), 100, 16, 4)


json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda v: st.lists(v, max_size=3), max_leaves=4)


@given(st.dictionaries(st.sampled_from([n for n, _ in tensor_fields()]) | st.text(max_size=12), json_values, max_size=5))
def test_junk_is_either_taken_or_refused_with_a_sentence(values):
    for tensors, parameters in (
        (PROMPT, values),
        ({**PROMPT, "sampling_parameters": text(json.dumps(values))}, {}),
    ):
        try:
            parsed = parse(tensors, parameters)
        except RequestError as error:
            assert str(error)
        else:
            assert parsed[0].text == "hello"
