"""Guided answers at temperature 1, judged by others: jsonschema for schemas, re for expressions, a parser
of our own for a grammar.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from pagetide.engine.guides import GrammarCompiler
from pagetide.llm import LLM
from pagetide.text.tokens import Vocabulary
from pagetide.types import Guide, RequestError, SamplingParams

CACHE = str(Path(__file__).parents[2] / ".cache")
PROMPT = "Here is an example:\n"


@pytest.fixture(scope="module")
def llm():
    engine = LLM(cache_dir=CACHE, num_blocks=2000, max_model_len=2048)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def compiler(llm):
    return GrammarCompiler(Vocabulary.read(Path(llm.engine.info.model)), llm.engine.info.vocab_size, [2])


def guided(kind: str, text: str = "", **params: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 600, "seed": 11, "guide": Guide(kind, text), **params})


def an_object(
    optional: dict[str, Any] | None = None, is_open: bool = False, **required: Any
) -> dict[str, Any]:
    """An object's schema from those of its properties."""
    schema = {"type": "object", "properties": {**required, **(optional or {})}, "required": list(required)}
    return schema if is_open else {**schema, "additionalProperties": False}


def whole(low: int, high: int) -> dict[str, Any]:
    return {"type": "integer", "minimum": low, "maximum": high}


def words(longest: int, shortest: int = 0) -> dict[str, Any]:
    return {"type": "string", "minLength": shortest, "maxLength": longest}


def listed(items: dict[str, Any], most: int, least: int = 0) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


POINT = {"$ref": "#/$defs/point"}
FLAG = {"type": "boolean"}
WRITTEN_SCHEMAS: list[dict[str, Any]] = [
    an_object(name=words(20), age=whole(0, 130), is_open=True),
    an_object(ok=FLAG),
    listed({"enum": ["red", "green", "blue"]}, 4, 2),
    listed(listed(whole(-9, 9), 2, 2), 3),
    {"enum": ["a", 1, None, True, "ß漢"]},
    {"const": {"fixed": [1, 2]}},
    {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{2,4}$"},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "uuid"},
    {"anyOf": [whole(5, 8), {"type": "null"}]},
    {"type": ["boolean", "null"]},
    {"$defs": {"point": an_object(x=whole(0, 99), y=whole(-99, 0))}, **an_object(start=POINT, end=POINT)},
    an_object(
        kind={"const": "circle"}, radius={"type": "number", "minimum": 0, "maximum": 10, "multipleOf": 0.25}
    ),
    an_object(tags=listed(words(8), 3), is_open=True),
    an_object(address=an_object(city=words(12, 1), zip={"type": "string", "pattern": "^[0-9]{5}$"})),
    {"oneOf": [an_object(a=whole(0, 9)), an_object(b=FLAG)]},
    {"type": "array", "prefixItems": [{"type": "integer"}, FLAG], "items": False, "minItems": 2},
    an_object({"maybe": {"type": "null"}}, sure=FLAG),
    {
        "type": "object",
        "patternProperties": {"^k[0-9]$": FLAG},
        "additionalProperties": False,
        "maxProperties": 3,
    },
    whole(100, 999),
]


def random_schema(rng: random.Random, depth: int) -> dict[str, Any]:
    """A schema whose answers have a bounded length."""
    kind = rng.choice(
        ["string", "integer", "boolean", "enum", "null", "number"]
        if depth == 0
        else ["object", "object", "array"]
    )
    match kind:
        case "string":
            return words(rng.randint(2, 16), rng.randint(0, 2))
        case "integer":
            low = rng.randint(-50, 50)
            return whole(low, low + rng.randint(0, 500))
        case "number":
            return {"type": "number", "minimum": 0, "maximum": rng.choice([1, 10, 2.5]), "multipleOf": 0.25}
        case "enum":
            return {
                "enum": rng.sample(
                    ["yes", "no", "maybe", 1, 2.5, None, "naïve", "a b", '"quoted"'], rng.randint(1, 4)
                )
            }
        case "array":
            low = rng.randint(0, 2)
            return listed(random_schema(rng, depth - 1), low + rng.randint(0, 2), low)
        case "object":
            names = rng.sample(
                ["id", "title", "price", "in stock", "größe", "note", "next"], rng.randint(1, 3)
            )
            properties = {name: random_schema(rng, depth - 1) for name in names}
            required = {name: properties.pop(name) for name in names if rng.random() < 0.7}
            return an_object(properties, **required)
    return {"type": kind}


SCHEMAS = [*WRITTEN_SCHEMAS, *(random_schema(random.Random(seed), seed % 3) for seed in range(50))]


def test_every_answer_is_valid_under_its_schema(llm):
    params = [guided("json_schema", json.dumps(schema), seed=seed) for seed, schema in enumerate(SCHEMAS)]
    results = llm.generate([PROMPT] * len(params), params)
    for schema, result in zip(SCHEMAS, results, strict=True):
        answer = result.outputs[0]
        assert answer.finish_reason == "stop", (schema, answer.text)
        jsonschema.validate(json.loads(answer.text), schema)


EXPRESSIONS = [
    r"[0-9]{3}-[0-9]{4}",
    r"(yes|no|maybe)!",
    r"[A-Z][a-z]{2,9}( [A-Z][a-z]{2,9})?",
    r"#[0-9a-f]{6}",
    r"\d{4}-(0[1-9]|1[0-2])",
    r"[äöü🌊]{3}",
    r"a{0,2}b",
]


def test_every_answer_matches_its_expression(llm):
    results = llm.generate(
        [PROMPT] * len(EXPRESSIONS), [guided("regex", expression, n=4) for expression in EXPRESSIONS]
    )
    for expression, result in zip(EXPRESSIONS, results, strict=True):
        for answer in result.outputs:
            assert re.fullmatch(expression, answer.text), (expression, answer.text)
    assert len({answer.text for answer in results[0].outputs}) > 1, "samples have states of their own"


def test_an_answer_is_one_of_the_choices(llm):
    choices = ["Paris", "not Paris", 'a "quoted" one', "漢字"]
    result = llm.generate("The capital is", guided("choice", json.dumps(choices, ensure_ascii=False), n=8))[0]
    assert {answer.text for answer in result.outputs} <= set(choices)


def test_an_answer_follows_its_grammar(llm):
    grammar = 'root ::= "(" root ")" | [a-c]'
    for answer in llm.generate("x", guided("ebnf_grammar", grammar, n=6, max_tokens=100))[0].outputs:
        depth = answer.text.count("(")
        assert answer.text in [f"{'(' * depth}{letter}{')' * depth}" for letter in "abc"]


def test_json_without_a_schema_is_an_object(llm):
    result = llm.generate(
        '{"a": 1} is an example of JSON. Another short one:', guided("json", n=4, temperature=0.3)
    )[0]
    whole = [answer for answer in result.outputs if answer.finish_reason == "stop"]
    assert whole and all(isinstance(json.loads(answer.text), dict) for answer in whole)


def test_a_structural_tag_holds_between_its_marks(llm):
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    tag = {
        "type": "tag",
        "begin": "<call>",
        "content": {"type": "json_schema", "json_schema": schema},
        "end": "</call>",
    }
    text = (
        llm.generate(PROMPT, guided("structural_tag", json.dumps({"type": "structural_tag", "format": tag})))[
            0
        ]
        .outputs[0]
        .text
    )
    found = re.fullmatch(r"<call>(.*)</call>", text)
    assert found and json.loads(found[1])["city"] in ("Paris", "Rome")


def test_limits_and_stops_interact_with_a_grammar_as_expected(llm):
    def one(**params: Any):
        return llm.generate(PROMPT, guided(**params))[0].outputs[0]

    cut = one(kind="regex", text="[a-z]{50}", max_tokens=3)
    assert (cut.finish_reason, len(cut.token_ids)) == ("length", 3) and re.fullmatch("[a-z]+", cut.text)
    assert (
        one(
            kind="regex",
            text="x{1,40}",
            min_tokens=4,
            allowed_token_ids=tuple(llm.get_tokenizer()("xyz").input_ids),
        ).finish_reason
        == "stop"
    )
    assert one(kind="regex", text="(ab)+c", stop="aba", max_tokens=50).text in ("", "abc")
    assert len(one(kind="regex", text="a*", min_tokens=5, max_tokens=20).token_ids) >= 5, (
        "a grammar that goes on goes on"
    )
    assert one(kind="regex", text="ab", min_tokens=20).text == "ab", "one that has ended does not"
    x = llm.get_tokenizer()("x").input_ids[0]
    long = one(
        kind="regex", text="x*", min_tokens=4, max_tokens=8, allowed_token_ids=(x,), stop_token_ids=(x,)
    )
    assert (long.finish_reason, len(long.token_ids)) == ("stop", 4), "stop tokens wait for min_tokens too"
    assert one(kind="regex", text="ab", ignore_eos=True, max_tokens=20).text == "ab"


@pytest.mark.parametrize(
    "kind, text",
    [
        ("regex", "[a-"),
        ("ebnf_grammar", "root ::= nothing"),
        ("ebnf_grammar", "x ::= y ::="),
        ("json_schema", '{"type": "nope"}'),
        ("json_schema", '{"$ref": "#/nowhere"}'),
        ("structural_tag", "{}"),
    ],
)
def test_an_ungrammatical_grammar_is_a_clear_error(llm, kind, text):
    with pytest.raises(RequestError, match=f"guided_decoding_guide is no valid {kind}: "):
        llm.generate(PROMPT, guided(kind, text))
    assert llm.generate(PROMPT, guided("regex", "ok"))[0].outputs[0].text == "ok"


def walk(compiler: GrammarCompiler, guide: Guide, vocab_size: int, num_tokens: int, seed: int) -> None:
    """Takes allowed tokens at random; ends before an end token."""
    state, rng = compiler.compile(guide).result(60)(), np.random.default_rng(seed)
    mask = np.empty(-(-vocab_size // 32), np.int32)
    for _ in range(num_tokens):
        state.fill(mask)
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        token = int(rng.choice(allowed))
        if token == 2:
            return
        state.advance(token)


def test_requests_with_the_same_grammar_have_limits_of_their_own(llm, compiler):
    """Each makes the automaton larger: shared, it would be too large for all after a hundred of them."""
    for seed in range(200):
        walk(compiler, Guide("regex", "(a|b)*a(a|b){14}"), llm.engine.info.vocab_size, 20, seed)


@pytest.mark.parametrize(
    "kind, text",
    [
        (
            "json_schema",
            json.dumps(
                {
                    "$ref": "#/$defs/0",
                    "$defs": {**{str(i): {"$ref": f"#/$defs/{i + 1}"} for i in range(1900)}, "1900": {}},
                }
            ),
        ),
        (
            "json_schema",
            json.dumps(
                {
                    "$ref": "#/$defs/0",
                    "$defs": {
                        **{str(i): {"items": {"$ref": f"#/$defs/{i + 1}"}} for i in range(1300)},
                        "1300": {},
                    },
                }
            ),
        ),
        ("ebnf_grammar", "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(1200)) + 'r1200: "a"\n'),
        (
            "ebnf_grammar",
            "start: A0\n" + "".join(f'A{i}: A{i + 1} "b"\n' for i in range(900)) + 'A900: "a"\n',
        ),
        ("ebnf_grammar", 'root ::= "a"' + "\n" * 16_000),
        (
            "structural_tag",
            json.dumps(
                {"format": {"type": "sequence", "elements": [{"type": "const_string", "value": "x"}] * 1500}}
            ),
        ),
        ("regex", "(a{1000}){1000}"),
    ],
    ids=["references", "items", "rules", "terminals", "lines", "parts", "repetitions"],
)
def test_a_grammar_at_its_limits_works_or_is_refused(llm, compiler, kind, text):
    try:
        walk(compiler, Guide(kind, text), llm.engine.info.vocab_size, 12, 0)
    except RequestError as error:
        assert "guided_decoding_guide" in str(error)


@pytest.mark.parametrize(
    "text, expected", [("<f>1</f>", True), ("no tag", True), ("<f>1</f> and more", False)]
)
def test_a_structural_tag_that_stops_after_the_first_accepts_nothing_behind_it(llm, compiler, text, expected):
    tag = {"type": "tag", "begin": "<f>", "content": {"type": "regex", "pattern": r"[0-9]\/?"}, "end": "</f>"}
    form = {"type": "triggered_tags", "triggers": ["<f"], "tags": [tag], "stop_after_first": True}
    guide = Guide("structural_tag", json.dumps({"format": form}))
    state = compiler.compile(guide).result(60)()
    ids = llm.get_tokenizer()(text).input_ids
    assert (
        state._matcher.validate_tokens(ids) == len(ids)
        if expected
        else state._matcher.validate_tokens(ids) < len(ids)
    )
