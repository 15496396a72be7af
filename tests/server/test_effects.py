"""What every field of the contract does, over HTTP on the real model: the answer without it, and with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from client import generate, stream_one
from pagetide.contract.fields import FIELDS

PROMPT = "The capital of France is"
IDS = [504, 3575, 282, 4649, 314]
CHAT = json.dumps([{"role": "user", "content": "Say hello."}])
GREEDY = {"text_input": PROMPT, "max_tokens": 6, "temperature": 0}
HOT = {"text_input": PROMPT, "max_tokens": 6, "temperature": 5.0, "seed": 1}
LIST = {"text_input": "Fruits: apple, apple, apple, apple, apple,", "max_tokens": 16, "temperature": 0}
ENDS = {**GREEDY, "logit_bias": '{"2": 100}'}
SCORED = {**HOT, "temperature": 1.0, "return_log_probs": True}
Answer = dict[str, Any]
Check = Callable[[Answer, Answer], bool]


def starts(answer: Answer) -> bool:
    return answer["text_output"].startswith(" Paris.")


# Field -> what is sent without it, the field, and what its answer must be, given the one without.
EFFECTS: dict[str, tuple[dict[str, Any], dict[str, Any], Check]] = {
    "messages": (
        {**GREEDY, "return_num_input_tokens": True},
        {"messages": CHAT},
        lambda a, b: b["num_input_tokens"] > a["num_input_tokens"],
    ),
    "continue_final_message": (
        {
            "messages": json.dumps(
                [
                    {"role": "user", "content": "What is the capital of France?"},
                    {"role": "assistant", "content": "The capital of France is"},
                ]
            ),
            "max_tokens": 6,
            "temperature": 0,
        },
        {"continue_final_message": True},
        lambda a, b: b["text_output"].startswith(" Paris") and not a["text_output"].startswith(" Paris"),
    ),
    "add_generation_prompt": (
        {"messages": CHAT, "max_tokens": 2, "return_num_input_tokens": True},
        {"add_generation_prompt": False},
        lambda a, b: 0 < b["num_input_tokens"] < a["num_input_tokens"],
    ),
    "input_ids": (GREEDY, {"input_ids": IDS}, lambda a, b: a["text_output"] == b["text_output"]),
    "max_tokens": (GREEDY, {"max_tokens": 3}, lambda a, b: b["output_ids"] == a["output_ids"][:3]),
    "min_tokens": (
        ENDS,
        {"min_tokens": 4},
        lambda a, b: a["sequence_length"] == 1 and b["sequence_length"] >= 4,
    ),
    "temperature": (GREEDY, {"temperature": 5.0, "seed": 1}, lambda a, b: starts(a) and not starts(b)),
    "top_k": (HOT, {"top_k": 1}, lambda a, b: starts(b) and not starts(a)),
    "top_p": (HOT, {"top_p": 1e-6}, lambda a, b: starts(b) and not starts(a)),
    "min_p": (HOT, {"min_p": 1.0}, lambda a, b: starts(b) and not starts(a)),
    "repetition_penalty": (
        LIST,
        {"repetition_penalty": 100},
        lambda a, b: "apple" in a["text_output"] and "apple" not in b["text_output"],
    ),
    "presence_penalty": (LIST, {"presence_penalty": 2}, lambda a, b: distinct(b) > distinct(a)),
    "frequency_penalty": (LIST, {"frequency_penalty": 2}, lambda a, b: distinct(b) > distinct(a)),
    "seed": (HOT, {"seed": 2}, lambda a, b: a["output_ids"] != b["output_ids"]),
    "stop_words": (
        GREEDY,
        {"stop_words": ["x", "."]},
        lambda a, b: (b["text_output"], b["finish_reason"]) == (" Paris", "stop"),
    ),
    "bad_words": (
        GREEDY,
        {"bad_words": ["Paris"]},
        lambda a, b: "Paris" in a["text_output"] and "Paris" not in b["text_output"],
    ),
    "stop_token_ids": (
        GREEDY,
        {"stop_token_ids": [5, 30]},
        lambda a, b: (b["text_output"], b["finish_reason"]) == (" Paris", "stop"),
    ),
    "allowed_token_ids": (
        GREEDY,
        {"allowed_token_ids": [260, 282]},
        lambda a, b: set(b["output_ids"]) <= {260, 282},
    ),
    "include_stop_str_in_output": (
        {**GREEDY, "stop_words": "."},
        {"include_stop_str_in_output": True},
        lambda a, b: (a["text_output"], b["text_output"]) == (" Paris", " Paris."),
    ),
    "ignore_eos": (
        ENDS,
        {"ignore_eos": True},
        lambda a, b: (a["sequence_length"], b["sequence_length"]) == (1, 6),
    ),
    "skip_special_tokens": (
        {**GREEDY, "logit_bias": '{"5": 100}'},
        {"skip_special_tokens": False},
        lambda a, b: a["text_output"] == "" and b["text_output"] == "<file_sep>" * 6,
    ),
    "end_id": (
        GREEDY,
        {"end_id": 30},
        lambda a, b: (b["finish_reason"], b["sequence_length"]) == ("stop", 2),
    ),
    "pad_id": (
        {
            "text_input": "x",
            "beam_width": 2,
            "num_return_sequences": 2,
            "allowed_token_ids": [260],
            "max_tokens": 2,
        },
        {"pad_id": 7},
        lambda a, b: a["output_ids"] == [260, 260, 2, 2] and b["output_ids"] == [260, 260, 7, 7],
    ),
    "embedding_bias_words": (
        GREEDY,
        {"embedding_bias_words": [" Rome"], "embedding_bias_weights": [100]},
        lambda a, b: b["text_output"].startswith(" Rome"),
    ),
    "embedding_bias_weights": (
        {**GREEDY, "embedding_bias_words": [" Rome"], "embedding_bias_weights": [100]},
        {"embedding_bias_weights": [-100]},
        lambda a, b: "Rome" in a["text_output"] and starts(b),
    ),
    "logit_bias": (GREEDY, {"logit_bias": '{"260": 100}'}, lambda a, b: b["output_ids"] == [260] * 6),
    "num_return_sequences": (
        HOT,
        {"num_return_sequences": 3},
        lambda a, b: len(set(b["text_output"])) == 3 == len(b["finish_reason"]),
    ),
    "best_of": (SCORED, {"best_of": 8}, lambda a, b: b["cum_log_probs"] > a["cum_log_probs"]),
    "beam_width": (
        {**GREEDY, "return_log_probs": True, "max_tokens": 12},
        {"beam_width": 4},
        lambda a, b: b["cum_log_probs"] >= a["cum_log_probs"] - 1e-3,
    ),
    "return_log_probs": (
        GREEDY,
        {"return_log_probs": True},
        lambda a, b: "cum_log_probs" not in a and len(b["output_log_probs"]) == 6,
    ),
    "logprobs": (GREEDY, {"logprobs": 2}, lambda a, b: len(json.loads(b["logprobs"])["logprobs"][0]) == 2),
    "prompt_logprobs": (
        GREEDY,
        {"prompt_logprobs": 1},
        lambda a, b: len(json.loads(b["logprobs"])["prompt_logprobs"]) == 5,
    ),
    "return_logprobs": (
        GREEDY,
        {"return_logprobs": True},
        lambda a, b: len(json.loads(b["logprobs"])["logprobs"]) == 6,
    ),
    "return_context_logits": (
        GREEDY,
        {"return_context_logits": True},
        lambda a, b: len(b["context_logits"]) == 5 * 49152,
    ),
    "return_generation_logits": (
        GREEDY,
        {"return_generation_logits": True},
        lambda a, b: len(b["generation_logits"]) == 6 * 49152,
    ),
    "return_perf_metrics": (
        GREEDY,
        {"return_perf_metrics": True},
        lambda a, b: b["first_token_time_ns"] >= b["arrival_time_ns"] > 0,
    ),
    "return_finish_reason": (
        GREEDY,
        {"return_finish_reason": True},
        lambda a, b: a["finish_reason"] == b["finish_reason"] == "length",
    ),
    "return_num_input_tokens": (
        GREEDY,
        {"return_num_input_tokens": True},
        lambda a, b: b["num_input_tokens"] == 5 and "num_input_tokens" not in a,
    ),
    "return_num_output_tokens": (
        GREEDY,
        {"return_num_output_tokens": True},
        lambda a, b: b["num_output_tokens"] == 6,
    ),
    "return_num_cached_tokens": (
        {"input_ids": [7] * 40, "max_tokens": 1},
        {"return_num_cached_tokens": True},
        lambda a, b: b["num_cached_tokens"] == 32,
    ),
    "exclude_input_in_output": (
        GREEDY,
        {"exclude_input_in_output": False},
        lambda a, b: b["text_output"] == PROMPT + a["text_output"],
    ),
    "guided_decoding_guide_type": (
        {**GREEDY, "max_tokens": 30},
        {"guided_decoding_guide_type": "json"},
        lambda a, b: b["text_output"].startswith("{") and not a["text_output"].startswith("{"),
    ),
    "guided_decoding_guide": (
        {**GREEDY, "guided_decoding_guide_type": "regex", "guided_decoding_guide": "[0-9]{3}"},
        {"guided_decoding_guide": "[x-z]{2}"},
        lambda a, b: a["text_output"].isdigit() and set(b["text_output"]) <= set("xyz"),
    ),
    "sampling_parameters": (
        GREEDY,
        {"sampling_parameters": '{"stop": ["."]}'},
        lambda a, b: b["text_output"] == " Paris",
    ),
    "cache_salt": (
        {"input_ids": [9] * 40, "max_tokens": 1, "return_num_cached_tokens": True},
        {"cache_salt": "other"},
        lambda a, b: b["num_cached_tokens"] == 0,
    ),
}
EFFECTS["text_input"] = (GREEDY, {"text_input": "2 + 2 ="}, lambda a, b: starts(a) and not starts(b))
# What has nothing to act on says so by the field's name; the values that clients always send are ignored.
REFUSED = {
    "lora_name": "nobody",
    "lora_task_id": 3,
    "decoder_text_input": "x",
    "prompt_embedding_table": [1.0],
    "prompt_vocab_size": 2,
    "prompt_table_extra_id": [1],
    "lora_weights": [1.0],
    "lora_config": [1],
}
# Effects that need more than one request, or a model or template of their own: where they are shown.
ELSEWHERE = {
    "tools": "test_settings.py::test_a_template_sees_tools_variables_and_whether_an_answer_begins",
    "chat_template_kwargs": (
        "test_settings.py::test_a_template_sees_tools_variables_and_whether_an_answer_begins"
    ),
    "lora_name": "test_adapters_server.py::test_requests_with_and_without_adapters_equal_peft",
    "lora_task_id": "test_adapters_server.py::test_requests_with_and_without_adapters_equal_peft",
    "priority": "test_settings.py::test_lower_priority_numbers_run_sooner",
    "user": "test_settings.py::test_users_take_turns",
    "traceparent": "test_traces.py::test_triton_clients_name_their_trace_themselves",
    "timeout_ms": "test_contract_fields.py::test_a_request_whose_time_is_up_gets_what_it_has",
    "cancel": "test_faults.py::test_each_way_to_cancel_frees_everything_at_once",
    "length_penalty": "../engine/test_sampling.py::test_beams_are_transformers",
    "early_stopping": "../engine/test_sampling.py::test_beams_are_transformers",
    "stream": "test_effects.py::test_stream",
}


def distinct(answer: Answer) -> int:
    return len(set(answer["output_ids"]))


def ask(server: Any, body: dict[str, Any]) -> Answer:
    status, answer = generate(server, body, model="ensemble_unary")
    assert status == 200, (body, answer)
    return answer


@pytest.mark.parametrize("name", EFFECTS)
def test_a_field_does_what_its_sentence_says(real, name):
    base, values, is_right = EFFECTS[name]
    prompt = () if not {"messages", "input_ids"} & values.keys() else ("text_input",)
    body = {key: value for key, value in {**base, **values}.items() if key not in prompt}
    without, with_field = ask(real, base), ask(real, body)
    assert is_right(without, with_field), (without, with_field)


@pytest.mark.parametrize("name", REFUSED)
def test_a_field_that_nothing_can_be_done_with_is_refused_by_name(real, name):
    status, answer = generate(real, {**GREEDY, name: REFUSED[name]}, model="ensemble_unary")
    assert status == 400 and name in answer["error"], answer


def test_stream(real):
    values = {"text_input": PROMPT, "max_tokens": 60, "temperature": 0.0, "ignore_eos": True}
    streamed, whole = stream_one(real, stream=True, **values), stream_one(real, **values)
    assert len(streamed.responses) > 1 == len(whole.responses) and streamed.text == whole.text


def test_every_field_has_its_effect_shown():
    assert {field.name for field in FIELDS} == EFFECTS.keys() | REFUSED.keys() | ELSEWHERE.keys()
    for place in ELSEWHERE.values():
        file, test = place.split("::")
        assert f"def {test}(" in (Path(__file__).parent / file).read_text(), place
