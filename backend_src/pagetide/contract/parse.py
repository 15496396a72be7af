"""From what a client has sent, in tensors, request parameters or JSON, to checked requests for the engine."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
import numpy as np

from pagetide.contract.checks import check_params, check_words
from pagetide.contract.fields import FIELDS, MAX_WORD_LENGTH, Field, Value, tensor_fields
from pagetide.contract.guides import VLLM_GUIDES, guide_of_vllm, make_guide
from pagetide.contract.parsed import NO_DEFAULTS, Defaults, ParsedRequest
from pagetide.contract.values import CONVERTERS, boolean, int32, shown
from pagetide.types import GUIDE_KINDS, Guide, RequestError, SamplingParams

_BY_NAME = {name: field for field in FIELDS for name in field.names}
_IGNORED_PARAMETERS = {"Streaming", "binary_data_output"}
_OUR_GUIDE = {"guided_decoding_guide_type", "guided_decoding_guide"}
_PROMPTS = ("text_input", "messages", "input_ids")
# What vLLM's users may have in their JSON without asking for anything.
_HARMLESS: dict[str, tuple[Value, ...]] = {
    "detokenize": (True,),
    "spaces_between_special_tokens": (True, False),
    "use_beam_search": (False,),
    "truncate_prompt_tokens": (-1,),
}


def parse(
    tensors: Mapping[str, np.ndarray], parameters: Mapping[str, Any], defaults: Defaults = NO_DEFAULTS
) -> list[ParsedRequest]:
    """The prompts of one client request.

    tensors: [B, ...] each, by name; parameters: the request's own, by name. Raises RequestError.
    """
    given = {name: field for name, field in tensor_fields() if name in tensors}
    sizes = {len(tensors[name]) for name in given}
    if 0 in sizes:
        raise RequestError("the request has an empty batch, must have at least one prompt")
    if _is_cancel(tensors, parameters):
        return [ParsedRequest(cancel=True)] * max(sizes, default=1)
    _refuse_twice(given.values())
    if len(sizes) > 1:
        raise RequestError(f"the input tensors have batch sizes {sorted(sizes)}, all must be the same")
    shared = _from_mapping(_without_ignored(parameters), "parameter")
    rows = [_parse_row(tensors, given, row, shared, defaults) for row in range(sizes.pop() if sizes else 1)]
    # A cancel ends requests by their name: it is the whole request's, or none's.
    return [ParsedRequest(cancel=True)] * len(rows) if any(row.cancel for row in rows) else rows


def _is_cancel(tensors: Mapping[str, np.ndarray], parameters: Mapping[str, Any]) -> bool:
    """A cancel looks at no other field: TensorRT-LLM's clients send values with it that no request may
    have.
    """
    if "cancel" in tensors:
        return bool(tensors["cancel"].any())
    return "cancel" in parameters and boolean("cancel", parameters["cancel"])


def _without_ignored(parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {
        k: v for k, v in parameters.items() if k not in _IGNORED_PARAMETERS and not k.startswith("triton_")
    }


def _refuse_twice(fields: Iterable[Field]) -> None:
    seen = set()
    for field in fields:
        if field.name in seen:
            raise RequestError(
                f"{field.name} is given twice, as {' and as '.join(field.names)}; give one of them"
            )
        seen.add(field.name)


def _parse_row(
    tensors: Mapping[str, np.ndarray],
    given: Mapping[str, Field],
    row: int,
    shared: dict[str, Value],
    defaults: Defaults,
) -> ParsedRequest:
    # A tensor goes before sampling_parameters, which goes before a request parameter.
    own = {field.name: _from_tensor(field, name, tensors[name][row]) for name, field in given.items()}
    from_json = _from_mapping(own.pop("sampling_parameters", None) or {}, "field of sampling_parameters")
    values: dict[str, Value] = {}
    for source in (shared, from_json, own):
        given_here = {name: value for name, value in source.items() if value is not None}
        _let_guide_win(given_here, values)
        values |= given_here
    return _assemble(values, defaults)


def _let_guide_win(given: Mapping[str, Value], lower: dict[str, Value]) -> None:
    """A guide in one of its two forms goes before one in the other form from a source that ranks lower."""
    ours = _OUR_GUIDE & given.keys()
    if ours and "guide" in given:
        raise RequestError(f"a guide is given twice, as {' and as '.join(sorted(ours))} and in vLLM's form")
    for name in ["guide"] if ours else _OUR_GUIDE if "guide" in given else []:
        lower.pop(name, None)


def _assemble(values: dict[str, Value], defaults: Defaults) -> ParsedRequest:
    prompts = [name for name in _PROMPTS if name in values]
    if values.get("cancel", False):
        return ParsedRequest(cancel=True)
    if len(prompts) != 1:
        said = " and ".join(prompts) or "none of them"
        raise RequestError(f"a request needs exactly one of {', '.join(_PROMPTS)}; it has {said}")
    if "lora_name" in values and "lora_task_id" in values:
        raise RequestError("an adapter is named twice, by lora_name and by lora_task_id; give one of them")
    for name in ("lora_name", "cache_salt", "user", "traceparent"):
        if len(text := values.get(name, "")) > MAX_WORD_LENGTH:
            raise RequestError(f"{name} has {len(text)} characters, may have {MAX_WORD_LENGTH}")
    params = _params_of(values, defaults)
    check_params(params)
    stream = values.get("stream", False)
    return ParsedRequest(
        params=params,
        text=values.get("text_input"),
        messages=values.get("messages"),
        prompt_ids=list(values["input_ids"]) if "input_ids" in values else None,
        tools=values.get("tools"),
        add_generation_prompt=values.get("add_generation_prompt", True),
        continue_final_message=values.get("continue_final_message", False),
        chat_template_kwargs=values.get("chat_template_kwargs", {}),
        stream=stream,
        includes_input=not stream and not values.get("exclude_input_in_output", defaults.excludes_input),
        pad_id=values.get("pad_id"),
        priority=values.get("priority", 0),
        salt=values.get("cache_salt", ""),
        lora_name=values.get("lora_name", "") or str(values.get("lora_task_id", "")),
        user=values.get("user", ""),
        traceparent=values.get("traceparent", ""),
        timeout_ms=values.get("timeout_ms", 0),
        returns=tuple(name for name, value in values.items() if name.startswith("return_") and value),
        shows_logprobs="logprobs" in values
        or "prompt_logprobs" in values
        or (defaults.flag_asks_for_logprobs and values.get("return_logprobs", False)),
    )


def _params_of(values: dict[str, Value], defaults: Defaults) -> SamplingParams:
    given = {
        field.attribute: values[field.name] for field in FIELDS if field.attribute and field.name in values
    }
    if defaults.is_greedy and not {"top_k", "top_p", "min_p", "seed"} & given.keys():
        given["temperature"] = 0.0
    given["word_bias"] = _word_bias(values)
    given["guide"] = values.get("guide") or _guide(values)
    if values.get("return_log_probs") or (values.get("return_logprobs") and defaults.flag_asks_for_logprobs):
        given.setdefault("logprobs", 0)
    default_max, min_tokens = defaults.params.max_tokens, given.get("min_tokens", 0)
    if default_max is not None and min_tokens > default_max:
        given.setdefault("max_tokens", min_tokens)
    return msgspec.structs.replace(defaults.params, **given)


def _word_bias(values: dict[str, Value]) -> dict[str, float]:
    words, weights = values.get("embedding_bias_words", ()), values.get("embedding_bias_weights", ())
    if len(words) != len(weights):
        raise RequestError(
            f"embedding_bias_words has {len(words)} words, embedding_bias_weights {len(weights)} "
            "numbers; there must be one for each"
        )
    check_words("embedding_bias_words", words)
    biases: dict[str, float] = {}
    for word, weight in zip(words, weights, strict=True):
        if not word:
            continue
        biases[word] = biases.get(word, 0.0) + weight
    return biases


# -- guides ------------------------------------------------------------------------------------------------


def _guide(values: dict[str, Value]) -> Guide | None:
    kind, guide = values.get("guided_decoding_guide_type"), values.get("guided_decoding_guide")
    if kind is None and guide is None:
        return None
    if kind is None:
        raise RequestError(
            f"guided_decoding_guide needs guided_decoding_guide_type, one of {', '.join(GUIDE_KINDS)}"
        )
    return make_guide(kind, guide or "")


# -- values ------------------------------------------------------------------------------------------------


def _from_mapping(values: Mapping[str, Any], what: str) -> dict[str, Value]:
    """Checked values by field name, from JSON or from request parameters. A JSON null is not given."""
    found: dict[str, Value] = {}
    for name, raw in values.items():
        if raw is None or _is_harmless(name, raw):
            continue
        if name in VLLM_GUIDES:
            if found.get("guide") is not None:
                raise RequestError(
                    f"a guide is given twice, as {' and as '.join(VLLM_GUIDES)}; give one of them"
                )
            found["guide"] = guide_of_vllm(name, raw)
            continue
        field = _BY_NAME.get(name)
        if field is None or field.is_prompt:
            raise RequestError(f"there is no {what} called {shown(name)}{_nearest(name)}")
        if field.name in found:
            raise RequestError(
                f"{field.name} is given twice, as {' and as '.join(field.names)}; give one of them"
            )
        found[field.name] = _convert(field, name, raw)
    return found


def _is_harmless(name: str, raw: Any) -> bool:
    return any(
        raw is value or (raw == value and type(raw) is type(value)) for value in _HARMLESS.get(name, ())
    )


def _nearest(name: str) -> str:
    if name in _HARMLESS:
        return f" that may be anything but {' or '.join(map(repr, _HARMLESS[name]))}"
    known = [name for name, field in _BY_NAME.items() if not field.is_prompt]
    near = difflib.get_close_matches(name[:100], known, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(near)}?" if near else f"; known are {', '.join(known)}"


def _from_tensor(field: Field, name: str, values: np.ndarray) -> Value:
    items = values.reshape(-1).tolist()
    if field.is_unsupported:
        _refuse_unsupported(field, name, items)
        return None
    if field.is_list:
        return _convert(field, name, items)
    if len(items) != 1:
        raise RequestError(f"{name} has {len(items)} values for one prompt, must be 1")
    return _convert(field, name, items[0])


def _refuse_unsupported(field: Field, name: str, items: list[Any]) -> None:
    plain = [item.decode("utf-8", "replace") if isinstance(item, bytes) else item for item in items]
    if any(item not in field.off for item in plain):
        raise RequestError(f"{name} is not supported by this model; leave it out")


def _convert(field: Field, name: str, raw: Any) -> Value:
    """The value as Python's type, within the field's range; None if it counts as not given."""
    if field.is_list:
        items = raw if isinstance(raw, list | tuple) else [raw]
        values = tuple(_convert_one(field, name, item) for item in items)
        # An empty text is no stop text and no bad word: TensorRT-LLM's clients always send one.
        return tuple(filter(None, values)) if field.name in ("stop_words", "bad_words") else values
    value = _convert_one(field, name, raw)
    return None if not isinstance(value, bool) and value in field.off else value


def _convert_one(field: Field, name: str, raw: Any) -> Value:
    value = CONVERTERS[field.kind or field.dtype](name, raw)
    if not field.is_allowed(value):
        raise RequestError(f"{name} is {shown(value)}, must be {field.allowed}")
    return int32(name, value) if field.dtype == "INT32" else value
