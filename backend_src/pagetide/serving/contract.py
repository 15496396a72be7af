"""ONE table of what a client may ask for: tensor name, aliases, type, range, default and sentence. Requests are parsed, checked and
documented by it, whichever way they come in; the models' config.pbtxt are written from it (scripts/make_model_configs.py).
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from pagetide.types import Request, RequestError, SamplingParams

Value = Any


@dataclass(frozen=True)
class Field:
    """One input of the ensemble.

    dtype: Triton's. dims: without the batch; -1: any number. attribute: the field of SamplingParams it sets, if any.
    low, high: the allowed range, both included. off: values that count as not given. default: as documented.
    """

    name: str
    dtype: str
    sentence: str
    default: str = ""
    aliases: tuple[str, ...] = ()
    is_list: bool = False
    attribute: str = ""
    low: int | None = None
    high: int | None = None
    off: tuple[float, ...] = ()
    is_named_tensor_only: bool = False

    @property
    def dims(self) -> int:
        return -1 if self.is_list else 1

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)


_INT32 = 2**31 - 1
MAX_STOPS, MAX_STOP_LENGTH = 64, 1024  # each new token is compared with all stop texts

FIELDS = (
    Field("text_input", "BYTES", "the prompt as it is", is_named_tensor_only=True),
    Field("messages", "BYTES", "JSON list of chat messages, rendered by the model's chat template", is_named_tensor_only=True),
    Field("tools", "BYTES", "JSON list of tools for the chat template"),
    Field("add_generation_prompt", "BOOL", "end the rendered chat with the beginning of an answer", "true"),
    Field("chat_template_kwargs", "BYTES", "JSON object of further variables for the chat template"),
    Field("input_ids", "INT32", "the prompt as token ids", is_list=True, is_named_tensor_only=True),
    Field("max_tokens", "INT32", "at most so many new tokens", "rest of the context", attribute="max_tokens", low=1, high=_INT32),
    Field("min_tokens", "INT32", "no end before so many new tokens", "0", ("min_length",), attribute="min_tokens", low=0, high=_INT32),
    Field("stream", "BOOL", "responses as tokens come; otherwise one for each sequence, at its end", "false"),
    Field("temperature", "FP32", "0 is greedy", "1.0", attribute="temperature", low=0, high=10**6),
    Field("top_k", "INT32", "keep the k likeliest tokens; 0 and -1: all", "0", ("runtime_top_k",), attribute="top_k", low=-1, high=_INT32),
    Field(
        "top_p",
        "FP32",
        "keep the likeliest tokens that make up this probability; 0: not given",
        "1.0",
        ("runtime_top_p",),
        attribute="top_p",
        low=0,
        high=1,
        off=(0,),
    ),
    Field("min_p", "FP32", "keep tokens at least so likely relative to the likeliest", "0.0", attribute="min_p", low=0, high=1),
    Field("seed", "UINT64", "same seed, same tokens, whatever else runs", "random", ("random_seed",), attribute="seed", low=0, high=2**64 - 1),
    Field("stop_words", "BYTES", "texts that end the answer and are cut off", "none", ("stop",), is_list=True, attribute="stop"),
    Field("end_id", "INT32", "token that ends the answer; -1: none", "the model's", attribute="end_id", low=-1, high=_INT32),
    Field("ignore_eos", "BOOL", "go on after the end token", "false", attribute="ignore_eos"),
    Field("num_return_sequences", "INT32", "samples of each prompt", "1", ("n",), attribute="n", low=1, high=_INT32),
    Field("exclude_input_in_output", "BOOL", "false: the prompt in front of the answer (never in streams)", "a setting, true"),
    Field("return_num_input_tokens", "BOOL", "return `num_input_tokens`", "false"),
    Field("return_num_output_tokens", "BOOL", "return `num_output_tokens`", "false"),
    Field("return_num_cached_tokens", "BOOL", "return `num_cached_tokens`", "false"),
    Field("cancel", "BOOL", "with the request_id of running requests: ends them", "false"),
    Field("sampling_parameters", "BYTES", "JSON object with any field of this table by name; numbers may be strings", is_named_tensor_only=True),
)

# Aliases that are no tensors of their own: `n` is the JSON name, and the face tensorrt_llm maps its own names.
_NO_TENSORS = {"n", "runtime_top_k", "runtime_top_p"}
_BY_NAME = {name: field for field in FIELDS for name in field.names}
_IGNORED_PARAMETERS = {"Streaming", "binary_data_output"}
_PROMPTS = ("text_input", "messages", "input_ids")


def tensor_fields() -> list[tuple[str, Field]]:
    """(tensor name, field) of every input tensor, aliases included."""
    return [(name, field) for field in FIELDS for name in field.names if name not in _NO_TENSORS]


class ParsedRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One prompt of a client's request, checked as far as it can be without the model.

    Exactly one of text, messages, prompt_ids is given, unless it is a cancel. This is also what `preprocessing` hands to `llm`, packed;
    prompt_text is then what stands in front of the answer.
    """

    params: SamplingParams = SamplingParams()
    text: str | None = None
    messages: list[dict[str, Any]] | None = None
    prompt_ids: list[int] | None = None
    prompt_text: str | None = None
    tools: list[Any] | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] = {}
    stream: bool = False
    includes_input: bool = False
    cancel: bool = False
    returns: tuple[str, ...] = ()


def parse(tensors: Mapping[str, np.ndarray], parameters: Mapping[str, Any], exclude_input: bool = True) -> list[ParsedRequest]:
    """The prompts of one client request. tensors: [B, ...] each, by name; parameters: the request's own, by name.

    exclude_input: what `exclude_input_in_output` is where nothing is said. Raises RequestError.
    """
    given = {name: field for name, field in tensor_fields() if name in tensors}
    _refuse_twice(given.values())
    sizes = {len(tensors[name]) for name in given}
    if len(sizes) > 1:
        raise RequestError(f"the input tensors have batch sizes {sorted(sizes)}, all must be the same")
    shared = _from_mapping(_without_ignored(parameters), "parameter")
    return [_parse_row(tensors, given, row, shared, exclude_input) for row in range(sizes.pop() if sizes else 1)]


def _without_ignored(parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in parameters.items() if k not in _IGNORED_PARAMETERS and not k.startswith("triton_")}


def _refuse_twice(fields: Any) -> None:
    seen = set()
    for field in fields:
        if field.name in seen:
            raise RequestError(f"{field.name} is given twice, as {' and as '.join(field.names)}; give one of them")
        seen.add(field.name)


def _parse_row(
    tensors: Mapping[str, np.ndarray], given: Mapping[str, Field], row: int, shared: dict[str, Value], exclude_input: bool
) -> ParsedRequest:
    # A tensor goes before sampling_parameters, which goes before a request parameter.
    own = {field.name: _from_tensor(field, name, tensors[name][row]) for name, field in given.items()}
    from_json = _from_mapping(_json_object(own.pop("sampling_parameters", None), "sampling_parameters"), "field of sampling_parameters")
    values = {name: value for name, value in {**shared, **from_json, **own}.items() if value is not None}
    return _assemble(values, exclude_input)


def _assemble(values: dict[str, Value], exclude_input: bool) -> ParsedRequest:
    prompts = [name for name in _PROMPTS if name in values]
    cancel = values.get("cancel", False)
    if len(prompts) != 1 and not cancel:
        said = " and ".join(prompts) or "none of them"
        raise RequestError(f"a request needs exactly one of {', '.join(_PROMPTS)}; it has {said}")
    params = SamplingParams(**{field.attribute: values[field.name] for field in FIELDS if field.attribute and field.name in values})
    check_params(params)
    stream = values.get("stream", False)
    return ParsedRequest(
        params=params,
        text=values.get("text_input"),
        messages=_json_list(values.get("messages"), "messages", dict),
        prompt_ids=list(values["input_ids"]) if "input_ids" in values else None,
        tools=_json_list(values.get("tools"), "tools", dict),
        add_generation_prompt=values.get("add_generation_prompt", True),
        chat_template_kwargs=_json_object(values.get("chat_template_kwargs"), "chat_template_kwargs"),
        stream=stream,
        includes_input=not stream and not values.get("exclude_input_in_output", exclude_input),
        cancel=cancel,
        returns=tuple(name.removeprefix("return_") for name, value in values.items() if name.startswith("return_") and value),
    )


# -- values ----------------------------------------------------------------------------------------------------------


def _from_mapping(values: Mapping[str, Any], what: str) -> dict[str, Value]:
    """Checked values by field name, from JSON or from request parameters."""
    found: dict[str, Value] = {}
    for name, raw in values.items():
        field = _BY_NAME.get(name)
        if field is None or field.is_named_tensor_only:
            raise RequestError(f"there is no {what} called {name!r}{_nearest(name)}")
        if field.name in found:
            raise RequestError(f"{field.name} is given twice, as {' and as '.join(field.names)}; give one of them")
        found[field.name] = _convert(field, name, raw)
    return found


def _nearest(name: str) -> str:
    known = [name for name, field in _BY_NAME.items() if not field.is_named_tensor_only]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(near)}?" if near else f"; known are {', '.join(known)}"


def _from_tensor(field: Field, name: str, values: np.ndarray) -> Value:
    items = values.reshape(-1).tolist()
    if field.is_list:
        return _convert(field, name, items)
    if len(items) != 1:
        raise RequestError(f"{name} has {len(items)} values for one prompt, must be 1")
    return _convert(field, name, items[0])


def _convert(field: Field, name: str, raw: Any) -> Value:
    """The value as Python's type, within the field's range; None if it counts as not given."""
    if field.is_list:
        items = raw if isinstance(raw, list | tuple) else [raw]
        return tuple(_CONVERTERS[field.dtype](name, item) for item in items)
    value = _CONVERTERS[field.dtype](name, raw)
    if field.low is not None and field.high is not None and not field.low <= value <= field.high:
        raise RequestError(f"{name} is {value}, must be {_allowed(field)}")
    return None if value in field.off and not isinstance(value, bool) else value


def _allowed(field: Field) -> str:
    assert field.low is not None and field.high is not None
    high = f"{field.high:g}" if field.dtype == "FP32" else f"{field.high:d}"
    return f"from {field.low:g} to {high}"


def _text(name: str, raw: Any) -> str:
    if isinstance(raw, str):
        return raw
    if isinstance(raw, bytes):
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise RequestError(f"{name} is not valid UTF-8 (byte {error.start}); it must be UTF-8 text") from None
    raise RequestError(f"{name} is {raw!r}, must be a text")


def _int(name: str, raw: Any) -> int:
    if isinstance(raw, int) and not isinstance(raw, bool):
        return raw
    if isinstance(raw, float) and raw.is_integer():
        return int(raw)
    if isinstance(raw, str):
        try:
            return int(raw)
        except ValueError:
            pass
    raise RequestError(f"{name} is {raw!r}, must be an integer")


def _float(name: str, raw: Any) -> float:
    if isinstance(raw, int | float | str) and not isinstance(raw, bool):
        try:
            value = float(raw)
        except (ValueError, OverflowError):
            value = math.nan
        if math.isfinite(value):
            return value
    raise RequestError(f"{name} is {raw!r}, must be a finite number")


def _bool(name: str, raw: Any) -> bool:
    if isinstance(raw, bool):
        return raw
    if raw in ("true", "True", "1", 1):
        return True
    if raw in ("false", "False", "0", 0):
        return False
    raise RequestError(f"{name} is {raw!r}, must be true or false")


_CONVERTERS: dict[str, Callable[[str, Any], Value]] = {"BYTES": _text, "INT32": _int, "UINT64": _int, "FP32": _float, "BOOL": _bool}


def _json(text: str, name: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise RequestError(f"{name} is not valid JSON ({error}); it must be {what}") from None


def _json_object(text: str | None, name: str) -> dict[str, Any]:
    value = _json(text, name, "a JSON object") if text else {}
    if not isinstance(value, dict):
        raise RequestError(f"{name} is a JSON {type(value).__name__}, must be an object")
    return value


def _json_list(text: str | None, name: str, kind: type) -> list[Any] | None:
    if text is None:
        return None
    value = _json(text, name, "a JSON list of objects")
    if not isinstance(value, list) or not value or not all(isinstance(item, kind) for item in value):
        raise RequestError(f"{name} must be a JSON list of at least one object")
    return value


# -- checks that every way in shares ---------------------------------------------------------------------------------


def check_params(params: SamplingParams) -> None:
    """Raises RequestError if a sampling parameter is out of range, or two do not go together."""
    for field in FIELDS:
        value = getattr(params, field.attribute) if field.attribute else None
        if value is None or field.low is None or field.high is None:
            continue
        if not isinstance(value, int | float) or isinstance(value, bool) or not field.low <= value <= field.high:
            raise RequestError(f"{field.name} is {value}, must be {_allowed(field)}")
    stops = params.stop_texts
    if len(stops) > MAX_STOPS or any(len(text) > MAX_STOP_LENGTH for text in stops):
        longest = max(map(len, stops))
        raise RequestError(f"stop_words has {len(stops)} texts of up to {longest} characters, may have {MAX_STOPS} of up to {MAX_STOP_LENGTH}")
    if params.max_tokens is not None and params.min_tokens > params.max_tokens:
        raise RequestError(f"min_tokens is {params.min_tokens}, must be at most max_tokens, which is {params.max_tokens}")


def check_request(request: Request, vocab_size: int, max_model_len: int, max_num_seqs: int) -> None:
    """Raises RequestError if the model cannot run this request."""
    check_params(request.params)
    ids = request.prompt_ids
    if not ids:
        raise RequestError("the prompt is empty, it must have at least one token")
    if len(ids) >= max_model_len:
        raise RequestError(f"the prompt has {len(ids)} tokens, must have at most {max_model_len - 1} (max_model_len is {max_model_len})")
    if min(ids) < 0 or max(ids) >= vocab_size:
        wrong = next(i for i in ids if not 0 <= i < vocab_size)
        raise RequestError(f"input_ids has the token id {wrong}, must be from 0 to {vocab_size - 1}")
    if request.params.n > max_num_seqs:
        raise RequestError(f"num_return_sequences is {request.params.n}, must be at most {max_num_seqs} (the setting max_num_seqs)")
    if request.params.end_id is not None and request.params.end_id >= vocab_size:
        raise RequestError(f"end_id is {request.params.end_id}, must be from -1 to {vocab_size - 1}")
