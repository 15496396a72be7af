"""What requests may say, whichever way they say it; one case for each row of the table and each rule."""

from __future__ import annotations

import json
import re

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pagetide.contract.checks import check_params, check_request
from pagetide.contract.fields import FIELDS, MAX_WORDS, tensor_fields
from pagetide.contract.parse import parse
from pagetide.contract.parsed import Defaults, timed
from pagetide.types import EngineInfo, Guide, Request, RequestError, SamplingParams


def text(*values: str) -> np.ndarray:
    return np.array([[v.encode()] for v in values], dtype=np.object_)


PROMPT = {"text_input": text("hello")}
ENGINE = EngineInfo(
    "",
    vocab_size=100,
    max_model_len=16,
    max_num_seqs=4,
    pad_id=0,
    device="cpu",
    num_blocks=10,
    block_size=4,
    allows_logits=False,
)


def parse_one(**parameters):
    return parse(PROMPT, parameters)[0]


@pytest.mark.parametrize("field", [f for f in FIELDS if f.low is not None], ids=lambda f: f.name)
def test_a_value_out_of_range_names_field_value_and_range(field):
    wrong_values = [field.low - 1, field.high + 1 if field.high <= 1 else field.high * 2]
    for wrong in wrong_values:
        with pytest.raises(
            RequestError, match=rf"{field.name} is {wrong}(\.0)?, must be {re.escape(field.allowed)}"
        ):
            parse_one(**{field.name: wrong})


@pytest.mark.parametrize(
    "name, field", [(n, f) for n, f in tensor_fields() if f.attribute and not f.is_list and not f.kind]
)
def test_a_tensor_a_parameter_and_json_mean_the_same(name, field):
    value = not getattr(SamplingParams(), field.attribute) if field.dtype == "BOOL" else 1
    kind = {"BOOL": np.bool_, "INT32": np.int32, "FP32": np.float32, "UINT64": np.uint64}[field.dtype]
    by_tensor = parse({**PROMPT, name: np.array([[value]], kind)}, {})[0].params
    assert getattr(by_tensor, field.attribute) == value
    assert by_tensor == parse_one(**{name: value}).params
    assert (
        by_tensor
        == parse({**PROMPT, "sampling_parameters": text(json.dumps({name: str(value).lower()}))}, {})[
            0
        ].params
    )


def test_a_tensor_goes_before_sampling_parameters_before_a_parameter():
    tensors = {
        **PROMPT,
        "sampling_parameters": text('{"top_k": 2, "min_tokens": 2}'),
        "top_k": np.array([[1]], np.int32),
    }
    params = parse(tensors, {"top_k": 3, "min_tokens": 3, "min_p": 0.5})[0].params
    assert (params.top_k, params.min_tokens, params.min_p) == (1, 2, 0.5)


def test_an_unknown_parameter_offers_the_nearest_names():
    with pytest.raises(RequestError, match="no parameter called 'temprature'; did you mean temperature"):
        parse_one(temprature=1)
    with pytest.raises(RequestError, match="no field of sampling_parameters called 'zzz'; known are"):
        parse({**PROMPT, "sampling_parameters": text('{"zzz": 1}')}, {})


def test_some_names_are_ignored():
    assert (
        parse_one(Streaming=True, binary_data_output=True, triton_enable_empty_final_response=True).params
        == SamplingParams()
    )


def test_a_value_that_counts_as_not_given_hides_none_of_a_lower_source():
    tensors = {**PROMPT, "top_p": np.zeros((1, 1), np.float32), "timeout_ms": np.zeros((1, 1), np.int32)}
    (found,) = parse(tensors | {"guided_decoding_guide_type": text("")}, {"top_p": 0.5, "timeout_ms": 5})
    assert (found.params.top_p, found.timeout_ms) == (0.5, 5)
    (found,) = parse({**tensors, "sampling_parameters": text('{"top_p": 0.25}')}, {"top_p": 0.5})
    assert found.params.top_p == 0.25


def test_of_two_guides_in_different_forms_the_higher_source_wins():
    ours = {"guided_decoding_guide_type": text("choice"), "guided_decoding_guide": text('["a"]')}
    vllms = text('{"guided_decoding": {"regex": "a+"}}')
    (found,) = parse({**PROMPT, **ours, "sampling_parameters": vllms}, {})
    assert found.params.guide == Guide("choice", '["a"]')
    lower = {"guided_decoding_guide_type": "json"}
    (found,) = parse({**PROMPT, "sampling_parameters": vllms}, lower)
    assert found.params.guide == Guide("regex", "a+")
    for twice in (
        '{"guided_decoding": {"regex": "a+"}, "structured_outputs": {"regex": "b"}}',
        '{"guided_decoding": {"regex": "a+"}, "guided_decoding_guide_type": "json"}',
    ):
        with pytest.raises(RequestError, match="a guide is given twice"):
            parse({**PROMPT, "sampling_parameters": text(twice)}, {})


def test_top_p_zero_counts_as_not_given():
    assert parse_one(top_p=0).params.top_p == 1.0


@pytest.mark.parametrize("tensors", [{}, {**PROMPT, "input_ids": np.array([[1]], np.int32)}])
def test_exactly_one_prompt(tensors):
    with pytest.raises(RequestError, match="exactly one of text_input, messages, input_ids"):
        parse(tensors or {"top_k": np.array([[1]], np.int32)}, {})


def test_the_same_field_under_two_names_is_refused():
    with pytest.raises(RequestError, match="min_tokens is given twice, as min_tokens and as min_length"):
        parse(
            {**PROMPT, "min_tokens": np.array([[1]], np.int32), "min_length": np.array([[1]], np.int32)}, {}
        )


def test_several_prompts_have_their_own_values():
    tensors = {
        "text_input": text("a", "b"),
        "top_k": np.array([[1], [2]], np.int32),
        "stop": np.array([[b"x", b""], [b"y", b"z"]], np.object_),
    }
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
        (
            {**PROMPT, "sampling_parameters": text("[1]")},
            "sampling_parameters is a JSON list, must be an object",
        ),
        (
            {**PROMPT, "temperature": np.array([[np.nan]], np.float32)},
            "temperature is nan, must be a finite number",
        ),
        (
            {**PROMPT, "chat_template_kwargs": text("3")},
            "chat_template_kwargs is a JSON int, must be an object",
        ),
        ({**PROMPT, "logit_bias": text('{"a": 1}')}, "logit_bias's token is 'a', must be an integer"),
        ({**PROMPT, "logit_bias": text('{"1": NaN}')}, "logit_bias is not valid JSON"),
        (
            {**PROMPT, "logit_bias": text('{"1": 1e9}')},
            "logit_bias of token 1 is 1000000000.0, must be from -100 to 100",
        ),
        (
            {**PROMPT, "embedding_bias_words": text("a")},
            "embedding_bias_words has 1 words, embedding_bias_weights 0 numbers",
        ),
        ({**PROMPT, "lora_name": text("x" * 2000)}, "lora_name has 2000 characters, may have"),
        (
            {**PROMPT, "lora_name": text("a"), "lora_task_id": np.array([[1]], np.uint64)},
            "an adapter is named twice, by lora_name and by lora_task_id; give one of them",
        ),
        (
            {**PROMPT, "prompt_vocab_size": np.array([[7]], np.int32)},
            "prompt_vocab_size is not supported by this model",
        ),
        ({**PROMPT, "decoder_text_input": text("x")}, "decoder_text_input is not supported by this model"),
        ({**PROMPT, "text_input": text("a\0b")}, "must be a text without zero bytes"),
        (
            {**PROMPT, "guided_decoding_guide": text("x")},
            "guided_decoding_guide needs guided_decoding_guide_type",
        ),
        (
            {**PROMPT, "guided_decoding_guide_type": text("poem")},
            "guided_decoding_guide_type is 'poem', must be one of json, json_schema",
        ),
        ({**PROMPT, "guided_decoding_guide_type": text("regex")}, "guided_decoding_guide has 0 characters"),
    ],
)
def test_bad_values_have_one_clear_sentence(tensors, message):
    with pytest.raises(RequestError, match=message):
        parse(tensors, {})


@pytest.mark.parametrize(
    "name, wrong",
    [("max_tokens", "many"), ("max_tokens", 1.5), ("temperature", "warm"), ("stream", "maybe"), ("stop", 3)],
)
def test_wrong_types_are_told(name, wrong):
    with pytest.raises(RequestError, match=f"{name} is {wrong!r}, must be"):
        parse_one(**{name: wrong})


def test_min_tokens_must_not_be_above_max_tokens():
    with pytest.raises(RequestError, match="min_tokens is 5, must be at most max_tokens, which is 4"):
        check_params(SamplingParams(min_tokens=5, max_tokens=4))


def test_the_number_of_stop_texts_is_bounded():
    with pytest.raises(RequestError, match="stop_words has 65 texts"):
        check_params(SamplingParams(stop=("x",) * (MAX_WORDS + 1)))


@pytest.mark.parametrize(
    "ids, params, message",
    [
        ([], {}, "the prompt is empty"),
        ([1] * 16, {}, "the prompt has 16 tokens, must have at most 15"),
        ([1, 100], {}, "input_ids has the token id 100, must be from 0 to 99"),
        ([-1], {}, "input_ids has the token id -1"),
        ([1], {"n": 5}, "num_return_sequences is 5, must be at most 4"),
        ([1], {"end_id": 100}, "end_id is 100, must be from -1 to 99"),
        ([1], {"best_of": 5}, "best_of is 5, must be at most 4"),
        ([1], {"beam_width": 5}, "beam_width is 5, must be at most 4"),
        (
            [1],
            {"beam_width": 4, "max_tokens": 10},
            "with up to 11 tokens the beams may need 16 KV blocks and there are 10",
        ),
        ([1], {"logit_bias": {100: 1.0}}, "logit_bias has the token id 100, must be from 0 to 99"),
        ([1], {"stop_token_ids": (-1,)}, "stop_token_ids has the token id -1"),
        ([1], {"allowed_token_ids": (1, 100)}, "allowed_token_ids has the token id 100"),
    ],
)
def test_requests_that_the_model_cannot_run_are_refused(ids, params, message):
    with pytest.raises(RequestError, match=message):
        check_request(Request(number=1, prompt_ids=ids, params=SamplingParams(**params)), ENGINE)


def test_logits_are_refused_unless_the_server_allows_them():
    request = Request(number=1, prompt_ids=[1], params=SamplingParams(), context_logits=True)
    with pytest.raises(RequestError, match="the setting allow_logits is false"):
        check_request(request, ENGINE)
    check_request(request, msgspec.structs.replace(ENGINE, allows_logits=True))


def test_logits_that_would_fill_the_memory_are_refused():
    large = msgspec.structs.replace(ENGINE, allows_logits=True, vocab_size=150_000, max_model_len=100_000)
    prompt = Request(number=1, prompt_ids=[1] * 7_100, params=SamplingParams(), context_logits=True)
    answers = Request(
        number=1, prompt_ids=[1], params=SamplingParams(n=4, max_tokens=1_000), generation_logits=True
    )
    for request, size in ((prompt, "4.0"), (answers, "2.2")):
        with pytest.raises(RequestError, match=f"logits of this request may take {size} GiB"):
            check_request(request, large)
    check_request(msgspec.structs.replace(answers, stream=True), large)


def test_harmless_values_of_unsupported_fields_are_ignored():
    nothing = {
        "prompt_vocab_size": np.array([[0]], np.int32),
        "decoder_text_input": text(""),
        "lora_weights": np.zeros((1, 0, 0), np.float16),
    }
    assert (
        parse({**PROMPT, **nothing, "lora_task_id": np.array([[0]], np.uint64)}, {})[0].params
        == SamplingParams()
    )


def test_an_adapter_has_a_name_or_a_number():
    number = {"lora_task_id": np.array([[2**64 - 1]], np.uint64)}
    assert parse({**PROMPT, **number}, {})[0].lora_name == str(2**64 - 1)
    assert parse({**PROMPT, "lora_name": text("sailor")}, {})[0].lora_name == "sailor"
    assert parse({**PROMPT, "lora_name": text("")}, {})[0].lora_name == ""


def test_defaults_hold_where_a_request_says_nothing():
    defaults = Defaults(SamplingParams(temperature=0.6, top_k=20), is_greedy=False, excludes_input=False)
    parsed = parse(PROMPT, {"top_k": 3}, defaults)[0]
    assert (parsed.params.temperature, parsed.params.top_k, parsed.includes_input) == (0.6, 3, True)


@pytest.mark.parametrize(
    "given, temperature",
    [({}, 0), ({"top_p": 0, "temperature": 2}, 0), ({"top_k": 5}, 1), ({"seed": 1, "temperature": 2}, 2)],
)
def test_with_tensorrt_llms_defaults_a_request_is_greedy_unless_it_asks_for_sampling(given, temperature):
    assert parse(PROMPT, given, Defaults(is_greedy=True))[0].params.temperature == temperature


@pytest.mark.parametrize(
    "guide, expected",
    [
        ({"json": {"type": "object"}}, Guide("json_schema", '{"type": "object"}')),
        ({"json": '{"type": "object"}'}, Guide("json_schema", '{"type": "object"}')),
        ({"json_object": True, "regex": None}, Guide("json")),
        ({"regex": "a+"}, Guide("regex", "a+")),
        ({"choice": ["a", "b"]}, Guide("choice", '["a", "b"]')),
        ({"grammar": "root ::= 'a'"}, Guide("ebnf_grammar", "root ::= 'a'")),
    ],
)
@pytest.mark.parametrize("name", ["guided_decoding", "structured_outputs"])
def test_guides_in_vllms_form(name, guide, expected):
    assert (
        parse({**PROMPT, "sampling_parameters": text(json.dumps({name: guide}))}, {})[0].params.guide
        == expected
    )
    with pytest.raises(RequestError, match=f"{name} has 'json', 'regex'; must have one of"):
        parse({**PROMPT, "sampling_parameters": text(json.dumps({name: {"json": {}, "regex": "a"}}))}, {})


def test_what_vllms_users_send_without_asking_for_anything_is_ignored():
    sent = {
        "detokenize": True,
        "spaces_between_special_tokens": False,
        "use_beam_search": False,
        "bad_words": None,
        "n": "2",
    }
    assert parse({**PROMPT, "sampling_parameters": text(json.dumps(sent))}, {})[0].params == SamplingParams(
        n=2
    )
    with pytest.raises(RequestError, match="use_beam_search"):
        parse({**PROMPT, "sampling_parameters": text('{"use_beam_search": true}')}, {})


def test_the_earlier_of_two_deadlines_counts_from_arrival():
    assert timed(parse_one(timeout_ms=5), 10**9, 2000).deadline_ns == 10**9 + 2 * 10**6
    assert timed(parse_one(timeout_ms=5), 10**9, 0).deadline_ns == 10**9 + 5 * 10**6
    assert timed(parse_one(timeout_ms=0), 10**9, 0).deadline_ns == 0


@pytest.mark.parametrize(
    "params, message",
    [
        ({"n": 3, "best_of": 2}, "best_of is 2, must be at least num_return_sequences, which is 3"),
        ({"n": 3, "beam_width": 2}, "num_return_sequences is 3, must be at most beam_width, which is 2"),
        ({"best_of": 3, "beam_width": 2}, "best_of is 3 and beam_width 2; give one of them"),
        ({"guide": Guide("json"), "beam_width": 2}, "beam_width is 2, must be 1 with guided decoding"),
        ({"stop_token_ids": tuple(range(2000))}, "stop_token_ids has 2000 tokens, may have 1024"),
    ],
)
def test_what_does_not_go_together_is_told(params, message):
    with pytest.raises(RequestError, match=message):
        check_params(SamplingParams(**params))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda v: st.lists(v, max_size=3),
    max_leaves=4,
)


@given(
    st.dictionaries(
        st.sampled_from([n for n, _ in tensor_fields()]) | st.text(max_size=12), json_values, max_size=5
    )
)
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
            assert parsed[0].text == "hello" or parsed[0].cancel


def test_a_cancel_is_the_whole_requests_and_looks_at_no_other_field():
    wrong = {"max_tokens": np.array([[0], [0]], np.int32), "cancel": np.array([[True], [False]])}
    assert [row.cancel for row in parse(wrong, {})] == [True, True]
    tensors = {"text_input": text("a", "b"), "sampling_parameters": text('{"cancel": true}', '{"n": 2}')}
    assert [(row.cancel, row.params.n) for row in parse(tensors, {})] == [(True, 1), (True, 1)]
    assert parse({}, {"cancel": True, "max_tokens": -1})[0].cancel


def test_an_empty_batch_is_refused():
    with pytest.raises(RequestError, match="empty batch"):
        parse({"text_input": np.zeros((0, 1), np.object_)}, {})


def test_empty_words_are_no_words():
    tensors = {
        name: np.array([[b"", b"x"]], np.object_)
        for name in ("stop_words", "bad_words", "embedding_bias_words")
    }
    params = parse({**PROMPT, **tensors, "embedding_bias_weights": np.array([[5, 7]], np.float32)}, {})[
        0
    ].params
    assert (params.stop, params.bad_words, params.word_bias) == (("x",), ("x",), {"x": 7})


def test_a_request_wins_over_the_models_default_length():
    defaults = Defaults(SamplingParams(max_tokens=10))
    assert parse(PROMPT, {"min_tokens": 20}, defaults)[0].params.max_tokens == 20
    assert parse(PROMPT, {"min_tokens": 5}, defaults)[0].params.max_tokens == 10


@pytest.mark.parametrize("timeout_us, timeout_ms", [(9 * 10**18, 0), (2**64 - 1, 0), (0, 0)])
def test_a_time_limit_beyond_all_times_is_none(timeout_us, timeout_ms):
    assert timed(parse(PROMPT, {"timeout_ms": timeout_ms})[0], 5, timeout_us).deadline_ns == 0


def test_float32_bounds_are_within_their_range():
    assert parse({**PROMPT, "repetition_penalty": np.array([[0.01]], np.float32)}, {})[
        0
    ].params.repetition_penalty == pytest.approx(0.01)
