"""The Responses API through the official client, on a real server."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from client import metric, wait_for
from pydantic import BaseModel
from test_openai import FRANCE, chat

QUESTION = FRANCE[0]["content"]
WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather of a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Oslo"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}


def respond(client: openai.OpenAI, **asked: Any) -> Any:
    return client.responses.create(
        model="ensemble", temperature=0, **{"input": QUESTION, "max_output_tokens": 12, **asked}
    )


def test_a_response_is_what_a_chat_says(client):
    """Whole and streamed; how it is counted is the same too."""
    (choice,) = (said := chat(client)).choices
    response = respond(client)
    assert response.output_text == choice.message.content and response.status == "completed"
    assert (response.usage.input_tokens, response.usage.output_tokens) == (
        said.usage.prompt_tokens,
        said.usage.completion_tokens,
    )
    with client.responses.stream(
        model="ensemble", input=QUESTION, temperature=0, max_output_tokens=12
    ) as events:
        texts = [event.delta for event in events if event.type == "response.output_text.delta"]
        final = events.get_final_response()
    assert "".join(texts) == final.output_text == response.output_text and len(texts) > 1
    assert final.usage.output_tokens == response.usage.output_tokens


def test_a_response_that_is_cut_is_incomplete(client):
    response = respond(client, max_output_tokens=2)
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert response.output[0].status == "incomplete" and response.usage.output_tokens == 2
    *_, last = respond(client, max_output_tokens=2, stream=True)
    assert last.type == "response.incomplete" and last.response.output_text == response.output_text


def test_instructions_and_earlier_turns_are_part_of_the_prompt(client):
    turns = [
        {"role": "system", "content": "Answer in French."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Bonjour"},
        {"role": "user", "content": QUESTION},
    ]
    (choice,) = chat(client, messages=turns).choices
    response = respond(client, instructions=turns[0]["content"], input=turns[1:])
    assert response.output_text == choice.message.content and response.instructions == turns[0]["content"]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "get_weather"}])
@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_was_asked_for_always_parses_and_can_be_answered(client, choice, stream):
    asked = {"tools": [WEATHER], "tool_choice": choice, "stream": stream, "max_output_tokens": 60}
    asked["top_logprobs"] = 1  # which are of texts only, and open no item of their own
    found = respond(client, input="Is it raining in Oslo?", **asked)
    if stream:
        *_, last = found
        found = last.response
    (call,) = found.output
    assert call.type == "function_call" and call.name == "get_weather"
    assert json.loads(call.arguments)["city"] in ("Paris", "Oslo")
    turns = [{"role": "user", "content": "Is it raining in Oslo?"}, call.model_dump(exclude_none=True)]
    turns.append({"type": "function_call_output", "call_id": call.call_id, "output": "It rains."})
    answer = respond(client, input=turns, tools=[WEATHER], tool_choice="none")
    assert answer.output_text and [item.type for item in answer.output] == ["message"]


def test_an_answer_follows_its_schema(client):
    class City(BaseModel):
        name: str
        is_large: bool

    asked = {"model": "ensemble", "input": "A city", "temperature": 0, "max_output_tokens": 60}
    found = client.responses.parse(text_format=City, **asked)
    assert isinstance(found.output_parsed, City)


def test_log_probabilities_stand_beside_the_text(client):
    response = respond(client, include=["message.output_text.logprobs"], top_logprobs=2, max_output_tokens=4)
    (part,) = response.output[0].content
    assert "".join(token.token for token in part.logprobs) == part.text
    assert all(len(token.top_logprobs) == 2 for token in part.logprobs)


def test_further_fields_are_the_servers_own(client):
    texts = {respond(client, extra_body={"top_k": 1, "seed": i}).output_text for i in range(2)}
    assert texts == {respond(client).output_text}
    with pytest.raises(openai.BadRequestError, match="top_k is -3"):
        respond(client, extra_body={"top_k": -3})


def test_a_client_that_leaves_frees_its_request(real, client):
    events = respond(client, max_output_tokens=1500, stream=True, extra_body={"ignore_eos": True})
    next(iter(events))
    events.close()
    wait_for(lambda: metric(real, "pagetide_requests_running") == 0, 5, "nothing runs for nobody")


def test_langchain_speaks_it_too(gateway):
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(
        model="ensemble", base_url=f"{gateway.url}/v1", api_key="none", temperature=0, use_responses_api=True
    )
    assert "Paris" in model.invoke(QUESTION).text
    assert "Paris" in "".join(chunk.text for chunk in model.stream(QUESTION))
