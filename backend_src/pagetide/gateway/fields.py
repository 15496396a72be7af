"""From OpenAI's bodies to the contract's fields (pagetide/contract/fields.py), by whose names the server
checks them.
"""

from __future__ import annotations

import json
from typing import Any

from pagetide.gateway.bodies import ChatBody, CompletionBody, GenerationBody, TokenizeBody, Tool
from pagetide.gateway.errors import refused

MAX_PROMPTS = 256  # of one request; each is a stream to Triton
# Names that change nothing in an answer here.
_IGNORED = {
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "reasoning_effort",
    "verbosity",
}
# Names of OpenAI's that ask for what cannot be done: the value that asks for nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "functions": ([],),
    "function_call": ("none",),
    "audio": (),
    "modalities": (["text"],),
    "prediction": (),
    "web_search_options": (),
}
# Fields of the contract that are the gateway's own to set.
_OWN = (
    "prompt_logprobs",
    "cancel",
    "exclude_input_in_output",
    "num_return_sequences",
    "stop_words",
    "random_seed",
)
_GUIDES = {"guided_decoding_guide_type", "guided_decoding", "structured_outputs"}
_LEAST_TOP_P = 1e-6  # the contract's 0 is none at all
_SAME_NAME = ("temperature", "top_p", "presence_penalty", "frequency_penalty", "logit_bias")


def fields_of(body: GenerationBody) -> dict[str, Any]:
    """The contract's fields but the prompt. Raises ApiError for what is refused by name."""
    fields = {name: value for name in _SAME_NAME if (value := getattr(body, name)) is not None}
    if body.top_p == 0:
        fields["top_p"] = _LEAST_TOP_P
    fields |= _further(body.model_extra or {})
    fields["stream"] = bool(body.stream)
    if body.n is not None:
        fields["n"] = body.n
    if body.seed is not None:
        fields["seed"] = body.seed % 2**64  # OpenAI's may be below 0
    if body.stop:
        fields["stop"] = body.stop
    fields |= _guide(body)
    fields |= _of_chat(body) if isinstance(body, ChatBody) else {}
    fields |= _of_completion(body) if isinstance(body, CompletionBody) else {}
    return fields


def _further(extra: dict[str, Any]) -> dict[str, Any]:
    for name, harmless in _UNSUPPORTED.items():
        if extra.get(name) is not None and extra[name] not in harmless:
            raise refused(f"{name} is not supported by this server; leave it out", name)
    given = {name: value for name, value in extra.items() if value is not None}
    for name in given:
        if name in _OWN or name.startswith("return_"):
            raise refused(f"{name} is no field of this API; leave it out", name)
    return {name: given[name] for name in given if name not in _IGNORED and name not in _UNSUPPORTED}


def _guide(body: GenerationBody) -> dict[str, Any]:
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return {}
    if wanted.type == "json_object":
        return {"guided_decoding_guide_type": "json"}
    if wanted.json_schema is None:
        raise refused("response_format of type json_schema needs json_schema", "response_format")
    return schema_guide(wanted.json_schema.json_schema)


def is_guided(fields: dict[str, Any]) -> bool:
    """Whether the answer follows a guide, from its first token on."""
    return not _GUIDES.isdisjoint(fields)


def schema_guide(schema: dict[str, Any]) -> dict[str, Any]:
    """The fields that make an answer follow a JSON schema."""
    return {"guided_decoding_guide_type": "json_schema", "guided_decoding_guide": json.dumps(schema)}


def _of_chat(body: ChatBody) -> dict[str, Any]:
    limit = body.max_completion_tokens or body.max_tokens
    fields: dict[str, Any] = {} if limit is None else {"max_tokens": limit}
    if body.top_logprobs and not body.logprobs:
        raise refused("top_logprobs needs logprobs to be true", "top_logprobs")
    if body.logprobs:
        fields["logprobs"] = body.top_logprobs or 0
    return fields


def _of_completion(body: CompletionBody) -> dict[str, Any]:
    fields: dict[str, Any] = {"max_tokens": 16 if body.max_tokens is None else body.max_tokens}
    if body.best_of is not None:
        if body.best_of < (body.n or 1):
            raise refused(f"best_of is {body.best_of}, must be at least n, {body.n or 1}", "best_of")
        if body.stream and body.best_of > (body.n or 1):
            raise refused("best_of above n does not go with stream", "best_of")
        fields["best_of"] = body.best_of
    if body.logprobs is not None:
        fields["logprobs"] = body.logprobs
        if body.echo:
            fields["prompt_logprobs"] = body.logprobs
    return fields


def prompts_of(body: CompletionBody) -> list[dict[str, Any]]:
    """Each prompt of a completion as the tensor that holds it."""
    prompt: Any = body.prompt
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        prompt = [prompt]
    if not prompt:
        raise refused("prompt is an empty list, must have at least one prompt", "prompt")
    if len(prompt) > MAX_PROMPTS:
        raise refused(f"prompt has {len(prompt)} prompts, may have {MAX_PROMPTS}", "prompt")
    return [{"text_input": one} if isinstance(one, str) else {"input_ids": one} for one in prompt]


def chat_prompt(body: ChatBody | TokenizeBody, tools: list[dict[str, Any]] | None) -> dict[str, Any]:
    """A chat as the tensors that hold it; tools: as the template shows them."""
    prompt: dict[str, Any] = {
        "messages": body.messages,
        "add_generation_prompt": body.add_generation_prompt,
        "continue_final_message": body.continue_final_message,
        "tools": tools,
        "chat_template_kwargs": body.chat_template_kwargs,
    }
    return {name: value for name, value in prompt.items() if value is not None}


def prompt_to_tokenize(body: TokenizeBody) -> dict[str, Any]:
    """The prompt whose tokens are asked for, as tensors."""
    if (body.prompt is None) == (body.messages is None):
        raise refused("give either prompt or messages", "prompt")
    if body.prompt is not None:
        return {"text_input": body.prompt}
    return chat_prompt(body, shown_tools(body.tools))


def shown_tools(tools: list[Tool] | None) -> list[dict[str, Any]] | None:
    """Tools as chat templates take them."""
    return [tool.model_dump(exclude_none=True) for tool in tools] if tools else None
