"""ONE table of what a client may ask for: tensor name, aliases, type, range, default and sentence. Requests are parsed, checked and
documented by it, whichever way they come in; the models' config.pbtxt are written from it (scripts/make_model_configs.py).
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from pagetide.serving.values import CONVERTERS, boolean, int32, json_object, json_value, shown, text
from pagetide.types import GUIDE_KINDS, EngineInfo, Guide, Request, RequestError, SamplingParams

Value = Any


@dataclass(frozen=True)
class Field:
    """One input of the ensemble.

    dtype: Triton's. kind: how the value is read, by CONVERTERS; dtype if empty. default: as documented.
    attribute: the field of SamplingParams it sets, if any. low, high: the allowed range, both included.
    off: values that count as not given. is_list: any number of values. is_prompt: not found in sampling_parameters or request parameters.
    is_unsupported: declared because Triton refuses unknown names; only values in `off`, and empty ones, are accepted.
    """

    name: str
    dtype: str
    sentence: str
    default: str = ""
    aliases: tuple[str, ...] = ()
    kind: str = ""
    is_list: bool = False
    attribute: str = ""
    low: float | None = None
    high: float | None = None
    off: tuple[Value, ...] = ()
    is_prompt: bool = False
    is_unsupported: bool = False
    num_dims: int = 1

    @property
    def dims(self) -> str:
        return ", ".join(["-1"] * self.num_dims) if self.is_list else "1"

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)

    @property
    def allowed(self) -> str:
        """The range in words."""
        assert self.low is not None and self.high is not None
        low, high = (f"{bound:g}" if self.dtype == "FP32" else f"{bound:d}" for bound in (self.low, self.high))
        return f"from {low} to {high}"

    def is_allowed(self, value: Value) -> bool:
        """True if the field has no range, or the value is within it."""
        if self.low is None or self.high is None:
            return True
        return isinstance(value, int | float) and not isinstance(value, bool) and self._is_in_range(value)

    def _is_in_range(self, value: float) -> bool:
        assert self.low is not None and self.high is not None
        low, high = self.low, self.high
        if self.dtype == "FP32":  # a tensor holds the bound as float32 has it, which may lie beyond
            low, high = min(low, float(np.float32(low))), max(high, float(np.float32(high)))
        return low <= value <= high


_INT32 = 2**31 - 1
_NEVER_NS = 10 * 365 * 86_400 * 10**9  # ten years: whoever asks for more asks for no limit
MAX_WORDS, MAX_WORD_LENGTH = 64, 1024  # each new token is compared with all stop texts, and may be with all bad words
MAX_TOKEN_RULES = 1024  # logit_bias and token lists
MAX_LOGPROBS = 20
# Compiling a grammar takes time that grows faster than its length.
MAX_GUIDE_LENGTH = {"json_schema": 64 * 1024, "regex": 16 * 1024, "ebnf_grammar": 16 * 1024, "choice": 256 * 1024, "structural_tag": 64 * 1024}


def sampling(name: str, dtype: str, sentence: str, default: str = "", aliases: tuple[str, ...] = (), **rest: Any) -> Field:
    """A field that sets the field of SamplingParams with its name."""
    return Field(name, dtype, sentence, default, aliases, **{"attribute": name, **rest})


def unsupported(name: str, dtype: str, off: tuple[Value, ...] = (), num_dims: int = 0) -> Field:
    sentence = "TensorRT-LLM's name; harmless values are ignored, others refused"
    return Field(name, dtype, sentence, "none", is_list=num_dims > 0, num_dims=num_dims, off=off, is_prompt=True, is_unsupported=True)


FIELDS = (
    Field("text_input", "BYTES", "the prompt as it is", is_prompt=True),
    Field("messages", "BYTES", "JSON list of chat messages, rendered by the model's chat template", kind="objects", is_prompt=True),
    Field("tools", "BYTES", "JSON list of tools for the chat template", kind="objects"),
    Field("add_generation_prompt", "BOOL", "end the rendered chat with the beginning of an answer", "true"),
    Field("chat_template_kwargs", "BYTES", "JSON object of further variables for the chat template", kind="object"),
    Field("input_ids", "INT32", "the prompt as token ids", is_list=True, is_prompt=True),
    sampling("max_tokens", "INT32", "at most so many new tokens", "rest of the context", low=1, high=_INT32),
    sampling("min_tokens", "INT32", "no end before so many new tokens", "0", ("min_length",), low=0, high=_INT32),
    Field("stream", "BOOL", "responses as tokens come; otherwise one for each sequence, at its end", "false"),
    sampling("temperature", "FP32", "0 is greedy, as is all below 0.001", "the model's, 1.0", low=0, high=10**6),
    sampling("top_k", "INT32", "keep the k likeliest tokens; 0 and -1: all", "the model's, 0", ("runtime_top_k",), low=-1, high=_INT32),
    sampling(
        "top_p",
        "FP32",
        "keep the likeliest tokens that make up this probability; 0: not given",
        "the model's, 1.0",
        ("runtime_top_p",),
        low=0,
        high=1,
        off=(0,),
    ),
    sampling("min_p", "FP32", "keep tokens at least so likely relative to the likeliest", "the model's, 0.0", low=0, high=1),
    sampling(
        "repetition_penalty",
        "FP32",
        "above 1: tokens of prompt and answer become less likely",
        "the model's, 1.0",
        low=0.01,
        high=100,
    ),
    sampling("presence_penalty", "FP32", "taken from the logits of tokens that the answer has", "0.0", low=-2, high=2),
    sampling("frequency_penalty", "FP32", "the same, for each occurrence", "0.0", low=-2, high=2),
    sampling("seed", "UINT64", "same seed, same tokens, whatever else runs", "random", ("random_seed",), low=0, high=2**64 - 1),
    Field("stop_words", "BYTES", "texts that end the answer and are cut off", "none", ("stop",), is_list=True, attribute="stop"),
    sampling("bad_words", "BYTES", "texts that the answer never says", "none", is_list=True),
    sampling("stop_token_ids", "INT32", "tokens that end the answer and are cut off its text", "none", is_list=True),
    sampling("allowed_token_ids", "INT32", "the answer has no other tokens", "all", is_list=True),
    sampling("include_stop_str_in_output", "BOOL", "what ended the answer stays in its text", "false"),
    sampling("ignore_eos", "BOOL", "go on after the end token", "false"),
    sampling("skip_special_tokens", "BOOL", "special tokens do not show in the text", "true"),
    sampling("end_id", "INT32", "token that ends the answer; -1: none", "the model's", low=-1, high=_INT32),
    Field("pad_id", "INT32", "fills shorter rows of `output_ids`", "the model's", low=-1, high=_INT32),
    Field("embedding_bias_words", "BYTES", "words whose tokens' logits are changed", "none", is_list=True),
    Field("embedding_bias_weights", "FP32", "by how much, one for each word", "none", is_list=True, low=-1000, high=1000),
    sampling("logit_bias", "BYTES", 'JSON object {"token id": bias}, added to logits', "none", kind="biases"),
    sampling("num_return_sequences", "INT32", "answers to each prompt", "1", ("n",), attribute="n", low=1, high=_INT32),
    sampling("best_of", "INT32", "samples from which the likeliest answers are taken", "num_return_sequences", low=1, high=_INT32),
    sampling("beam_width", "INT32", "beam search with so many beams; 1: none", "1", low=1, high=_INT32),
    sampling("length_penalty", "FP32", "beams: scores are divided by length to this power", "1.0", ("len_penalty",), low=-10, high=10),
    sampling("early_stopping", "BOOL", "beams: end when `beam_width` have ended", "false"),
    Field("return_log_probs", "BOOL", "return `output_log_probs` and `cum_log_probs`", "false", ("return_cumulative_logprob",)),
    sampling(
        "logprobs",
        "INT32",
        "return `logprobs`: of the sampled tokens and of so many likeliest ones (a parameter, since an ensemble's output has this name)",
        "off",
        low=0,
        high=MAX_LOGPROBS,
    ),
    sampling("prompt_logprobs", "INT32", "the same for the prompt", "off", low=0, high=MAX_LOGPROBS),
    Field("return_logprobs", "BOOL", "vLLM's name: return `logprobs`", "false"),
    Field("return_context_logits", "BOOL", "return `context_logits`; needs the setting allow_logits", "false"),
    Field("return_generation_logits", "BOOL", "return `generation_logits`; needs the setting allow_logits", "false"),
    Field("return_perf_metrics", "BOOL", "return times and KV block counts", "false"),
    Field("return_finish_reason", "BOOL", "`finish_reason` is always returned", "false"),
    Field("return_num_input_tokens", "BOOL", "return `num_input_tokens`", "false"),
    Field("return_num_output_tokens", "BOOL", "return `num_output_tokens`", "false"),
    Field("return_num_cached_tokens", "BOOL", "return `num_cached_tokens`", "false"),
    Field("exclude_input_in_output", "BOOL", "false: the prompt in front of the answer (never in streams)", "a setting, true"),
    Field("guided_decoding_guide_type", "BYTES", f"what the answer must be: {', '.join(GUIDE_KINDS)}", "none", off=("",)),
    Field("guided_decoding_guide", "BYTES", "the schema, expression, grammar, JSON list of choices, or structural tag", "none", off=("",)),
    Field("lora_name", "BYTES", "a LoRA adapter by name", "none", off=("",)),
    Field("lora_task_id", "UINT64", "a LoRA adapter by number", "none", low=0, high=2**64 - 1, off=(0,)),
    Field("priority", "INT32", "lower runs sooner and is preempted later", "0", low=-_INT32, high=_INT32),
    Field("timeout_ms", "INT32", "ends the request so long after its arrival; 0: never", "none", low=0, high=_INT32, off=(0,)),
    Field("cache_salt", "BYTES", "prompts with different salts never share cached blocks", "none"),
    Field("cancel", "BOOL", "with the request_id of running requests: ends them", "false"),
    Field("sampling_parameters", "BYTES", "JSON object with any field of this table by name; numbers may be strings", kind="object", is_prompt=True),
    unsupported("decoder_text_input", "BYTES", off=("",)),
    unsupported("prompt_embedding_table", "FP16", num_dims=2),
    unsupported("prompt_vocab_size", "INT32", off=(0,)),
    unsupported("prompt_table_extra_id", "UINT64", num_dims=1),
    unsupported("lora_weights", "FP16", num_dims=2),
    unsupported("lora_config", "INT32", num_dims=2),
)

# Names that are no tensors: `n` is the JSON name, `logprobs` the name of an output, and the faces map the others.
_NO_TENSORS = {"n", "logprobs", "runtime_top_k", "runtime_top_p", "len_penalty", "return_cumulative_logprob"}
_BY_NAME = {name: field for field in FIELDS for name in field.names}
_IGNORED_PARAMETERS = {"Streaming", "binary_data_output"}
_PROMPTS = ("text_input", "messages", "input_ids")
# What vLLM's users may have in their JSON without asking for anything.
_HARMLESS: dict[str, tuple[Value, ...]] = {
    "detokenize": (True,),
    "spaces_between_special_tokens": (True, False),
    "use_beam_search": (False,),
    "truncate_prompt_tokens": (-1,),
}
_VLLM_GUIDES = ("guided_decoding", "structured_outputs")
# vLLM's names of guides; the value of json_object is true.
_GUIDE_OF_VLLM = {
    "json": "json_schema",
    "json_object": "json",
    "regex": "regex",
    "choice": "choice",
    "grammar": "ebnf_grammar",
    "structural_tag": "structural_tag",
}


def tensor_fields() -> list[tuple[str, Field]]:
    """(tensor name, field) of every input tensor, aliases included."""
    return [(name, field) for field in FIELDS for name in field.names if name not in _NO_TENSORS]


class Defaults(msgspec.Struct, frozen=True):
    """What holds where a request says nothing: the model's own sampling, and the settings' rules.

    is_greedy: without top_k, top_p, min_p and seed a request is greedy (TensorRT-LLM's rule).
    flag_asks_for_logprobs: return_logprobs alone asks for the sampled tokens' (Triton's vLLM backend answers null then).
    """

    params: SamplingParams = SamplingParams()
    is_greedy: bool = False
    excludes_input: bool = True
    flag_asks_for_logprobs: bool = True


NO_DEFAULTS = Defaults()


class ParsedRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One prompt of a client's request, checked as far as it can be without the model.

    Exactly one of text, messages, prompt_ids is given, unless it is a cancel. This is also what `preprocessing` hands to `llm`, packed;
    prompt_text is then what stands in front of the answer. returns: the outputs that are there only if asked for; shows_logprobs: `logprobs` too.
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
    pad_id: int | None = None
    priority: int = 0
    salt: str = ""
    timeout_ms: int = 0
    arrival_ns: int = 0
    deadline_ns: int = 0
    returns: tuple[str, ...] = ()
    shows_logprobs: bool = False


def parse(tensors: Mapping[str, np.ndarray], parameters: Mapping[str, Any], defaults: Defaults = NO_DEFAULTS) -> list[ParsedRequest]:
    """The prompts of one client request. tensors: [B, ...] each, by name; parameters: the request's own, by name. Raises RequestError."""
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
    """A cancel looks at no other field: TensorRT-LLM's clients send values with it that no request may have."""
    if "cancel" in tensors:
        return bool(tensors["cancel"].any())
    return "cancel" in parameters and boolean("cancel", parameters["cancel"])


def timed(parsed: ParsedRequest, arrival_ns: int, timeout_us: int) -> ParsedRequest:
    """The request with its arrival and deadline on the monotonic clock. timeout_us: the request's own, beside timeout_ms; 0: none."""
    limits = [limit for limit in (parsed.timeout_ms * 10**6, timeout_us * 10**3) if 0 < limit < _NEVER_NS]
    return msgspec.structs.replace(parsed, arrival_ns=arrival_ns, deadline_ns=arrival_ns + min(limits) if limits else 0)


def _without_ignored(parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in parameters.items() if k not in _IGNORED_PARAMETERS and not k.startswith("triton_")}


def _refuse_twice(fields: Iterable[Field]) -> None:
    seen = set()
    for field in fields:
        if field.name in seen:
            raise RequestError(f"{field.name} is given twice, as {' and as '.join(field.names)}; give one of them")
        seen.add(field.name)


def _parse_row(
    tensors: Mapping[str, np.ndarray], given: Mapping[str, Field], row: int, shared: dict[str, Value], defaults: Defaults
) -> ParsedRequest:
    # A tensor goes before sampling_parameters, which goes before a request parameter.
    own = {field.name: _from_tensor(field, name, tensors[name][row]) for name, field in given.items()}
    from_json = _from_mapping(own.pop("sampling_parameters", None) or {}, "field of sampling_parameters")
    values = {name: value for name, value in {**shared, **from_json, **own}.items() if value is not None}
    return _assemble(values, defaults)


def _assemble(values: dict[str, Value], defaults: Defaults) -> ParsedRequest:
    prompts = [name for name in _PROMPTS if name in values]
    if values.get("cancel", False):
        return ParsedRequest(cancel=True)
    if len(prompts) != 1:
        said = " and ".join(prompts) or "none of them"
        raise RequestError(f"a request needs exactly one of {', '.join(_PROMPTS)}; it has {said}")
    for name in ("lora_name", "lora_task_id"):
        if name in values:
            raise RequestError(f"{name} is {shown(values[name])}, but there is no such adapter: this server has none")
    salt = values.get("cache_salt", "")
    if len(salt) > MAX_WORD_LENGTH:
        raise RequestError(f"cache_salt has {len(salt)} characters, may have {MAX_WORD_LENGTH}")
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
        chat_template_kwargs=values.get("chat_template_kwargs", {}),
        stream=stream,
        includes_input=not stream and not values.get("exclude_input_in_output", defaults.excludes_input),
        pad_id=values.get("pad_id"),
        priority=values.get("priority", 0),
        salt=salt,
        timeout_ms=values.get("timeout_ms", 0),
        returns=tuple(name.removeprefix("return_") for name, value in values.items() if name.startswith("return_") and value),
        shows_logprobs="logprobs" in values
        or "prompt_logprobs" in values
        or (defaults.flag_asks_for_logprobs and values.get("return_logprobs", False)),
    )


def _params_of(values: dict[str, Value], defaults: Defaults) -> SamplingParams:
    given = {field.attribute: values[field.name] for field in FIELDS if field.attribute and field.name in values}
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
        raise RequestError(f"embedding_bias_words has {len(words)} words, embedding_bias_weights {len(weights)} numbers; there must be one for each")
    _check_words("embedding_bias_words", words)
    biases: dict[str, float] = {}
    for word, weight in zip(words, weights, strict=True):
        if not word:
            continue
        biases[word] = biases.get(word, 0.0) + weight
    return biases


# -- guides ----------------------------------------------------------------------------------------------------------


def _guide(values: dict[str, Value]) -> Guide | None:
    kind, guide = values.get("guided_decoding_guide_type"), values.get("guided_decoding_guide")
    if kind is None and guide is None:
        return None
    if kind is None:
        raise RequestError(f"guided_decoding_guide needs guided_decoding_guide_type, one of {', '.join(GUIDE_KINDS)}")
    return make_guide(kind, guide or "")


def make_guide(kind: str, guide: str) -> Guide:
    """A guide whose form is right, as far as it can be told without compiling it. Raises RequestError."""
    if kind not in GUIDE_KINDS:
        raise RequestError(f"guided_decoding_guide_type is {shown(kind)}, must be one of {', '.join(GUIDE_KINDS)}")
    if kind == "json":
        return Guide(kind)
    if not guide or len(guide) > MAX_GUIDE_LENGTH[kind]:
        raise RequestError(f"guided_decoding_guide has {len(guide)} characters, must have 1 to {MAX_GUIDE_LENGTH[kind]} for {kind}")
    if kind == "choice":
        _check_choices(json_value("guided_decoding_guide", guide, "a JSON list of texts"))
    elif kind == "json_schema":
        schema = json_value("guided_decoding_guide", guide, "a JSON schema")
        if not isinstance(schema, dict | bool):
            raise RequestError(f"guided_decoding_guide is a JSON {type(schema).__name__}, must be a JSON schema: an object")
    elif kind == "structural_tag":
        json_object("guided_decoding_guide", guide)
    return Guide(kind, guide)


def _check_choices(choices: Any) -> None:
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, str) and choice for choice in choices):
        raise RequestError("guided_decoding_guide must be a JSON list of at least one text, none of them empty")


def _guide_of_vllm(name: str, raw: Any) -> Guide | None:
    """vLLM's form: an object with one of the names of _GUIDE_OF_VLLM."""
    given = {key: value for key, value in json_object(name, raw).items() if value not in (None, False)}
    unknown = [key for key in given if key not in _GUIDE_OF_VLLM]
    if unknown or len(given) > 1:
        raise RequestError(f"{name} has {', '.join(map(shown, given))}; must have one of {', '.join(_GUIDE_OF_VLLM)}")
    for key, value in given.items():
        is_plain = isinstance(value, str)
        return make_guide(_GUIDE_OF_VLLM[key], text(name, value) if is_plain else json.dumps(value))
    return None


# -- values ----------------------------------------------------------------------------------------------------------


def _from_mapping(values: Mapping[str, Any], what: str) -> dict[str, Value]:
    """Checked values by field name, from JSON or from request parameters. A JSON null is not given."""
    found: dict[str, Value] = {}
    for name, raw in values.items():
        if raw is None or _is_harmless(name, raw):
            continue
        if name in _VLLM_GUIDES:
            found["guide"] = _guide_of_vllm(name, raw)
            continue
        field = _BY_NAME.get(name)
        if field is None or field.is_prompt:
            raise RequestError(f"there is no {what} called {shown(name)}{_nearest(name)}")
        if field.name in found:
            raise RequestError(f"{field.name} is given twice, as {' and as '.join(field.names)}; give one of them")
        found[field.name] = _convert(field, name, raw)
    return found


def _is_harmless(name: str, raw: Any) -> bool:
    return any(raw is value or (raw == value and type(raw) is type(value)) for value in _HARMLESS.get(name, ()))


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


# -- checks that every way in shares ---------------------------------------------------------------------------------


def check_params(params: SamplingParams) -> None:
    """Raises RequestError if a sampling parameter is out of range, or two do not go together."""
    for field in FIELDS:
        value = getattr(params, field.attribute) if field.attribute else None
        if value is not None and not field.is_allowed(value):
            raise RequestError(f"{field.name} is {shown(value)}, must be {field.allowed}")
    _check_words("stop_words", params.stop_texts)
    _check_words("bad_words", params.bad_words)
    _check_words("embedding_bias_words", tuple(params.word_bias))
    for name in ("logit_bias", "stop_token_ids"):
        if len(getattr(params, name)) > MAX_TOKEN_RULES:
            raise RequestError(f"{name} has {len(getattr(params, name))} tokens, may have {MAX_TOKEN_RULES}")
    for token, bias in params.logit_bias.items():
        if not -100 <= bias <= 100:
            raise RequestError(f"logit_bias of token {token} is {bias}, must be from -100 to 100")
    _check_together(params)


def _check_words(name: str, words: tuple[str, ...]) -> None:
    if len(words) > MAX_WORDS or any(len(word) > MAX_WORD_LENGTH for word in words):
        longest = max(map(len, words))
        raise RequestError(f"{name} has {len(words)} texts of up to {longest} characters, may have {MAX_WORDS} of up to {MAX_WORD_LENGTH}")


def _check_together(params: SamplingParams) -> None:
    if params.max_tokens is not None and params.min_tokens > params.max_tokens:
        raise RequestError(f"min_tokens is {params.min_tokens}, must be at most max_tokens, which is {params.max_tokens}")
    if params.best_of is not None and params.best_of < params.n:
        raise RequestError(f"best_of is {params.best_of}, must be at least num_return_sequences, which is {params.n}")
    if params.beam_width == 1:
        return
    if params.n > params.beam_width:
        raise RequestError(f"num_return_sequences is {params.n}, must be at most beam_width, which is {params.beam_width}")
    if params.best_of is not None:
        raise RequestError(f"best_of is {params.best_of} and beam_width {params.beam_width}; give one of them")
    if params.guide is not None:
        raise RequestError(f"beam_width is {params.beam_width}, must be 1 with guided decoding")


def check_request(request: Request, engine: EngineInfo) -> None:
    """Raises RequestError if the model cannot run this request."""
    check_params(request.params)
    ids, params, size = request.prompt_ids, request.params, engine.vocab_size
    if not ids:
        raise RequestError("the prompt is empty, it must have at least one token")
    if len(ids) >= engine.max_model_len:
        limit = engine.max_model_len
        raise RequestError(f"the prompt has {len(ids)} tokens, must have at most {limit - 1} (max_model_len is {limit})")
    tokens: list[tuple[str, Iterable[int]]] = [
        ("input_ids", ids),
        ("stop_token_ids", params.stop_token_ids),
        ("allowed_token_ids", params.allowed_token_ids),
        ("logit_bias", params.logit_bias),
    ]
    for name, listed in tokens:
        wrong = next((token for token in listed if not 0 <= token < size), None)
        if wrong is not None:
            raise RequestError(f"{name} has the token id {wrong}, must be from 0 to {size - 1}")
    if params.num_sequences > engine.max_num_seqs:
        name = "beam_width" if params.beam_width > 1 else "best_of" if params.best_of else "num_return_sequences"
        raise RequestError(f"{name} is {params.num_sequences}, must be at most {engine.max_num_seqs} (the setting max_num_seqs)")
    if params.end_id is not None and params.end_id >= size:
        raise RequestError(f"end_id is {params.end_id}, must be from -1 to {size - 1}")
    if (request.context_logits or request.generation_logits) and not engine.allows_logits:
        raise RequestError("return_context_logits and return_generation_logits are refused here (the setting allow_logits is false)")
    if request.generation_logits and params.beam_width > 1:
        raise RequestError(f"return_generation_logits does not go with beam search (beam_width is {params.beam_width}); leave one of them out")
    _check_beams(request, engine)


def _check_beams(request: Request, engine: EngineInfo) -> None:
    """All beams of a search must fit into the cache together."""
    params = request.params
    longest = min(len(request.prompt_ids) + (params.max_tokens or engine.max_model_len), engine.max_model_len)
    needed = params.beam_width * (-(-longest // engine.block_size) + 1)
    if params.beam_width > 1 and needed > engine.num_blocks:
        raise RequestError(
            f"beam_width is {params.beam_width}: with up to {longest} tokens the beams may need {needed} KV blocks and there are "
            f"{engine.num_blocks}; ask for fewer beams or a smaller max_tokens"
        )
