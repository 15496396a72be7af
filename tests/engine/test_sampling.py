"""What a request may ask of sampling, against transformers on the same model: penalties, biases, bad words,
beams, log-probabilities.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pagetide.llm import LLM
from pagetide.models.source import find_model
from pagetide.types import Output, Request, RequestError, SamplingParams
from transformers import AutoModelForCausalLM, AutoTokenizer

CACHE = str(Path(__file__).parents[2] / ".cache")
PROMPTS = [
    "The capital of France is",
    "Once upon a time, there was a little",
    "def fibonacci(n):",
    "A list of fruits: apple, banana, cherry, apple, banana,",
    "Water boils at",
    "In 1969, humans first",
]


@pytest.fixture(scope="module")
def llm():
    engine = LLM(
        cache_dir=CACHE,
        dtype="float32",
        num_blocks=1500,
        max_model_len=1200,
        check_integrity=True,
        allow_logits=True,
    )
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def hf():
    model = AutoModelForCausalLM.from_pretrained(str(find_model("", Path(CACHE))), dtype=torch.float32).eval()
    model.generation_config.pad_token_id = 2
    return model


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(str(find_model("", Path(CACHE))))


@pytest.fixture(scope="module")
def on_device(llm):
    """Runs transformers where the engine's kernels run: two pools of threads would hold each other up."""

    def run(function, *arguments, **settings):
        def call():
            with torch.inference_mode():
                return function(*arguments, **settings)

        return llm.engine.runner.device.run(call)

    return run


def generate(on_device, hf, tokenizer, prompt: str, **settings) -> list[list[int]]:
    """transformers' new tokens, without what fills up behind an end."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    out = on_device(hf.generate, ids, do_sample=False, **settings)
    end = hf.generation_config.eos_token_id
    ends = end if isinstance(end, list) else [end]
    answers = []
    for row in out[:, ids.shape[1] :].tolist():
        first = next((i for i, token in enumerate(row) if token in ends), len(row) - 1)
        answers.append(row[: first + 1])
    return answers


@pytest.mark.parametrize(
    "ours, theirs",
    [
        ({"repetition_penalty": 1.3}, lambda t: {"repetition_penalty": 1.3}),
        ({"min_tokens": 20}, lambda t: {"min_new_tokens": 20}),
        ({"logit_bias": {260: 4.0, 282: -100.0}}, lambda t: {"sequence_bias": {(260,): 4.0, (282,): -100.0}}),
        (
            {"bad_words": ("Paris", "small village", "the")},
            lambda t: {"bad_words_ids": spellings(t, ["Paris", "small village", "the"])},
        ),
    ],
    ids=["repetition_penalty", "min_tokens", "logit_bias", "bad_words"],
)
def test_greedy_answers_with_a_rule_are_transformers(llm, hf, on_device, tokenizer, ours, theirs):
    results = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=24, **ours))
    for prompt, result in zip(PROMPTS, results, strict=True):
        assert [result.outputs[0].token_ids] == generate(
            on_device, hf, tokenizer, prompt, max_new_tokens=24, **theirs(tokenizer)
        ), prompt


def spellings(tokenizer, words: list[str]) -> list[list[int]]:
    return [ids for word in words for ids in (tokenizer(word).input_ids, tokenizer(" " + word).input_ids)]


def test_rules_of_one_request_do_not_touch_its_neighbours(llm):
    """A batch in which every request has another rule gives what each gives alone."""
    rules = [
        {},
        {"repetition_penalty": 1.5},
        {"presence_penalty": 1.0},
        {"frequency_penalty": 0.7},
        {"bad_words": (" the",)},
        {"logit_bias": {260: 3.0}},
        {"allowed_token_ids": tuple(range(200, 900))},
        {"min_tokens": 12},
        {"temperature": 0.8, "top_k": 40, "seed": 1},
        {"temperature": 1.1, "top_p": 0.8, "seed": 2, "logprobs": 3},
        {"temperature": 0.7, "min_p": 0.1, "seed": 3, "frequency_penalty": 0.5},
        {"word_bias": {" Rome": 6.0}},
    ]
    params = [SamplingParams(**{"temperature": 0, "max_tokens": 16, **rule}) for rule in rules]
    together = llm.generate([PROMPTS[0]] * len(rules), params)
    for one, result in zip(params, together, strict=True):
        assert llm.generate(PROMPTS[0], one)[0].outputs[0].token_ids == result.outputs[0].token_ids, one
    assert len({tuple(result.outputs[0].token_ids) for result in together}) >= 9, (
        "the rules make a difference"
    )


def test_presence_and_frequency_follow_their_definition_step_by_step(llm):
    """Every greedy token is the argmax of the raw logits minus the penalties of the tokens so far."""
    rule = {"presence_penalty": 0.8, "frequency_penalty": 0.6}
    result = llm.generate(PROMPTS[3], SamplingParams(temperature=0, max_tokens=24, **rule))[0]
    answer = result.outputs[0].token_ids
    raw = logits_of(llm, [*result.prompt_token_ids, *answer])
    for i, token in enumerate(answer):
        values = raw[len(result.prompt_token_ids) - 1 + i].clone()
        for earlier in set(answer[:i]):
            values[earlier] -= 0.8 + 0.6 * answer[:i].count(earlier)
        assert values.argmax().item() == token


def logits_of(llm: LLM, ids: list[int]) -> torch.Tensor:
    """[len(ids), vocabulary] through the engine's own context logits."""
    outputs = run_requests(llm, [ids], SamplingParams(max_tokens=1), context_logits=True)
    return torch.frombuffer(bytearray(outputs[0].context_logits), dtype=torch.float32).reshape(len(ids), -1)


def run_requests(llm: LLM, prompts: list[list[int]], params: SamplingParams, **flags) -> list[Output]:
    """The engine's own outputs, one for each prompt."""
    for number, ids in enumerate(prompts):
        llm.engine.add(Request(number=-1 - number, prompt_ids=ids, params=params, **flags))
    outputs = []
    while llm.engine.has_work:
        outputs += llm.engine.step().outputs
    return sorted(outputs, key=lambda output: -output.number)


@pytest.mark.parametrize(
    "width, length_penalty, early_stopping",
    [(2, 1.0, False), (4, 0.0, False), (4, 2.0, True), (3, -1.0, False), (2, 1.0, True)],
)
def test_beams_are_transformers(llm, hf, on_device, tokenizer, width, length_penalty, early_stopping):
    rule = {"length_penalty": length_penalty, "early_stopping": early_stopping}
    results = llm.generate(PROMPTS[:4], SamplingParams(beam_width=width, n=width, max_tokens=16, **rule))
    for prompt, result in zip(PROMPTS[:4], results, strict=True):
        expected = generate(
            on_device,
            hf,
            tokenizer,
            prompt,
            num_beams=width,
            num_return_sequences=width,
            max_new_tokens=16,
            **rule,
        )
        assert [answer.token_ids for answer in result.outputs] == expected, prompt


def test_beams_that_end_early_are_transformers(llm, hf, on_device, tokenizer):
    """Chat answers that end by themselves within the limit."""
    texts = ["What is 2+2?", "Say hello.", "Name a colour."]
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        for text in texts
    ]
    results = llm.generate(prompts, SamplingParams(beam_width=3, n=3, max_tokens=40))
    reasons = [answer.finish_reason for result in results for answer in result.outputs]
    for prompt, result in zip(prompts, results, strict=True):
        assert [a.token_ids for a in result.outputs] == generate(
            on_device, hf, tokenizer, prompt, num_beams=3, num_return_sequences=3, max_new_tokens=40
        )
    assert "stop" in reasons


def test_log_probabilities_of_prompt_and_answer_are_transformers(llm, hf, on_device, tokenizer):
    results = llm.generate(
        PROMPTS, SamplingParams(temperature=0.8, seed=5, max_tokens=12, logprobs=4, prompt_logprobs=2)
    )
    for result in results:
        answer = result.outputs[0]
        ids = [*result.prompt_token_ids, *answer.token_ids]
        expected = on_device(hf, torch.tensor([ids])).logits[0].log_softmax(-1)
        num_prompt = len(result.prompt_token_ids)
        assert len(result.prompt_logprobs) == num_prompt - 1 and len(answer.logprobs) == len(answer.token_ids)
        for position, score in enumerate([*result.prompt_logprobs, *answer.logprobs], 1):
            row = expected[position - 1]
            assert score.logprob == pytest.approx(row[ids[position]].item(), abs=2e-3)
            num_top = 4 if position >= num_prompt else 2
            assert len(score.top_ids) == num_top
            torch.testing.assert_close(
                torch.tensor(score.top_logprobs), row.topk(num_top).values, atol=2e-3, rtol=0
            )
            assert abs(score.rank - int((row > row[ids[position]]).sum()) - 1) <= 2
        assert answer.cumulative_logprob == pytest.approx(sum(score.logprob for score in answer.logprobs))


def test_context_and_generation_logits_are_transformers(llm, hf, on_device, tokenizer):
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    params = SamplingParams(temperature=0, max_tokens=5)
    outputs = run_requests(llm, prompts, params, context_logits=True, generation_logits=True)
    for prompt, output in zip(prompts, outputs, strict=True):
        expected = on_device(hf, torch.tensor([prompt + output.ids])).logits[0]
        context = torch.frombuffer(bytearray(output.context_logits), dtype=torch.float32).reshape(
            len(prompt), -1
        )
        generation = torch.frombuffer(bytearray(output.generation_logits), dtype=torch.float32).reshape(
            len(output.ids), -1
        )
        torch.testing.assert_close(context, expected[: len(prompt)], atol=5e-3, rtol=1e-3)
        torch.testing.assert_close(generation, expected[len(prompt) - 1 : -1], atol=5e-3, rtol=1e-3)


def test_best_of_returns_the_samples_with_the_highest_log_probability(llm):
    every = llm.generate(PROMPTS[1], SamplingParams(n=6, seed=7, max_tokens=10, logprobs=0))[0].outputs
    best = llm.generate(PROMPTS[1], SamplingParams(n=2, best_of=6, seed=7, max_tokens=10))[0].outputs
    ranked = sorted(every, key=lambda answer: -answer.cumulative_logprob)
    assert [answer.token_ids for answer in best] == [answer.token_ids for answer in ranked[:2]]


def test_stop_token_ids_end_the_answer_and_do_not_show(llm, tokenizer):
    plain = llm.generate(PROMPTS[0], SamplingParams(temperature=0, max_tokens=12))[0].outputs[0]
    stop = plain.token_ids[1]
    answer = llm.generate(PROMPTS[0], SamplingParams(temperature=0, max_tokens=12, stop_token_ids=(stop,)))[
        0
    ].outputs[0]
    assert (answer.token_ids, answer.finish_reason) == (plain.token_ids[:2], "stop")
    assert answer.text == tokenizer.decode(plain.token_ids[:1])
    whole = llm.generate(
        PROMPTS[0],
        SamplingParams(temperature=0, max_tokens=12, stop_token_ids=(stop,), include_stop_str_in_output=True),
    )
    assert whole[0].outputs[0].text == tokenizer.decode(plain.token_ids[:2])


def test_special_tokens_show_only_if_asked_for(llm, tokenizer):
    special = tokenizer.convert_tokens_to_ids("<|im_start|>")
    params = {"temperature": 0, "max_tokens": 3, "allowed_token_ids": (special,)}
    assert llm.generate("a", SamplingParams(**params))[0].outputs[0].text == ""
    assert (
        llm.generate("a", SamplingParams(**params, skip_special_tokens=False))[0].outputs[0].text
        == "<|im_start|>" * 3
    )


def test_a_request_that_cannot_be_run_is_refused_before_anything_runs(llm):
    with pytest.raises(RequestError, match="logit_bias has the token id 999999"):
        llm.generate(PROMPTS[0], SamplingParams(logit_bias={999999: 1.0}))
