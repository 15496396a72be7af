"""ONE table of what a client may ask for: names, types, ranges, defaults, and a sentence for each field.

Requests are parsed, checked and documented by it, whichever way they come in; the models' config.pbtxt are
written from it (scripts/make_model_configs.py).
"""

from __future__ import annotations

from typing import Any

from pagetide.contract.field import Field, Value
from pagetide.types import GUIDE_KINDS

_INT32 = 2**31 - 1
MAX_WORDS, MAX_WORD_LENGTH = (
    64,
    1024,
)  # each new token is compared with all stop texts, and may be with all bad words
MAX_TOKEN_RULES = 1024  # logit_bias and token lists
MAX_LOGPROBS = 20


def sampling(
    name: str, dtype: str, sentence: str, default: str = "", aliases: tuple[str, ...] = (), **rest: Any
) -> Field:
    """A field that sets the field of SamplingParams with its name."""
    return Field(name, dtype, sentence, default, aliases, **{"attribute": name, **rest})


def unsupported(name: str, dtype: str, off: tuple[Value, ...] = (), num_dims: int = 0) -> Field:
    """A field that clients of TensorRT-LLM send and nothing here can honour. off: its harmless values."""
    sentence = "TensorRT-LLM's name; harmless values are ignored, others refused"
    return Field(
        name,
        dtype,
        sentence,
        "none",
        is_list=num_dims > 0,
        num_dims=num_dims,
        off=off,
        is_prompt=True,
        is_unsupported=True,
    )


FIELDS = (
    Field("text_input", "BYTES", "the prompt as it is", is_prompt=True),
    Field(
        "messages",
        "BYTES",
        "JSON list of chat messages, rendered by the model's chat template",
        kind="objects",
        is_prompt=True,
    ),
    Field("tools", "BYTES", "JSON list of tools for the chat template", kind="objects"),
    Field("add_generation_prompt", "BOOL", "end the rendered chat with the beginning of an answer", "true"),
    Field(
        "continue_final_message",
        "BOOL",
        "go on with the last message instead of answering it, whatever add_generation_prompt says",
        "false",
    ),
    Field(
        "chat_template_kwargs",
        "BYTES",
        "JSON object of further variables for the chat template",
        kind="object",
    ),
    Field("input_ids", "INT32", "the prompt as token ids", is_list=True, is_prompt=True),
    sampling("max_tokens", "INT32", "at most so many new tokens", "rest of the context", low=1, high=_INT32),
    sampling(
        "min_tokens", "INT32", "no end before so many new tokens", "0", ("min_length",), low=0, high=_INT32
    ),
    Field("stream", "BOOL", "responses as tokens come; otherwise one for each sequence, at its end", "false"),
    sampling(
        "temperature", "FP32", "0 is greedy, as is all below 0.001", "the model's, 1.0", low=0, high=10**6
    ),
    sampling(
        "top_k",
        "INT32",
        "keep the k likeliest tokens; 0 and -1: all",
        "the model's, 0",
        ("runtime_top_k",),
        low=-1,
        high=_INT32,
    ),
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
    sampling(
        "min_p",
        "FP32",
        "keep tokens at least so likely relative to the likeliest",
        "the model's, 0.0",
        low=0,
        high=1,
    ),
    sampling(
        "repetition_penalty",
        "FP32",
        "above 1: tokens of prompt and answer become less likely",
        "the model's, 1.0",
        low=0.01,
        high=100,
    ),
    sampling(
        "presence_penalty",
        "FP32",
        "taken from the logits of tokens that the answer has",
        "0.0",
        low=-2,
        high=2,
    ),
    sampling("frequency_penalty", "FP32", "the same, for each occurrence", "0.0", low=-2, high=2),
    sampling(
        "seed",
        "UINT64",
        "same seed, same tokens, whatever else runs",
        "random",
        ("random_seed",),
        low=0,
        high=2**64 - 1,
    ),
    Field(
        "stop_words",
        "BYTES",
        "texts that end the answer and are cut off",
        "none",
        ("stop",),
        is_list=True,
        attribute="stop",
    ),
    sampling("bad_words", "BYTES", "texts that the answer never says", "none", is_list=True),
    sampling(
        "stop_token_ids", "INT32", "tokens that end the answer and are cut off its text", "none", is_list=True
    ),
    sampling("allowed_token_ids", "INT32", "the answer has no other tokens", "all", is_list=True),
    sampling("include_stop_str_in_output", "BOOL", "what ended the answer stays in its text", "false"),
    sampling("ignore_eos", "BOOL", "go on after the end token", "false"),
    sampling("skip_special_tokens", "BOOL", "special tokens do not show in the text", "true"),
    sampling(
        "end_id",
        "INT32",
        "token that ends the answer; -1: none; a guide has its own end",
        "the model's",
        low=-1,
        high=_INT32,
    ),
    Field("pad_id", "INT32", "fills shorter rows of `output_ids`", "the model's", low=-1, high=_INT32),
    Field("embedding_bias_words", "BYTES", "words whose tokens' logits are changed", "none", is_list=True),
    Field(
        "embedding_bias_weights",
        "FP32",
        "by how much, one for each word",
        "none",
        is_list=True,
        low=-1000,
        high=1000,
    ),
    sampling("logit_bias", "BYTES", 'JSON object {"token id": bias}, added to logits', "none", kind="biases"),
    sampling(
        "num_return_sequences",
        "INT32",
        "answers to each prompt",
        "1",
        ("n",),
        attribute="n",
        low=1,
        high=_INT32,
    ),
    sampling(
        "best_of",
        "INT32",
        "samples from which the likeliest answers are taken",
        "num_return_sequences",
        low=1,
        high=_INT32,
    ),
    sampling("beam_width", "INT32", "beam search with so many beams; 1: none", "1", low=1, high=_INT32),
    sampling(
        "length_penalty",
        "FP32",
        "beams: scores are divided by length to this power",
        "1.0",
        ("len_penalty",),
        low=-10,
        high=10,
    ),
    sampling("early_stopping", "BOOL", "beams: end when `beam_width` have ended", "false"),
    Field(
        "return_log_probs",
        "BOOL",
        "return `output_log_probs` and `cum_log_probs`",
        "false",
        ("return_cumulative_logprob",),
    ),
    sampling(
        "logprobs",
        "INT32",
        "return `logprobs`: of the sampled tokens and of so many likeliest ones (a parameter, "
        "since an ensemble's output has this name)",
        "off",
        low=0,
        high=MAX_LOGPROBS,
    ),
    sampling("prompt_logprobs", "INT32", "the same for the prompt", "off", low=0, high=MAX_LOGPROBS),
    Field("return_logprobs", "BOOL", "vLLM's name: return `logprobs`", "false"),
    Field(
        "return_context_logits", "BOOL", "return `context_logits`; needs the setting allow_logits", "false"
    ),
    Field(
        "return_generation_logits",
        "BOOL",
        "return `generation_logits`; needs the setting allow_logits",
        "false",
    ),
    Field("return_perf_metrics", "BOOL", "return times and KV block counts", "false"),
    Field("return_finish_reason", "BOOL", "`finish_reason` is always returned", "false"),
    Field("return_num_input_tokens", "BOOL", "return `num_input_tokens`", "false"),
    Field("return_num_output_tokens", "BOOL", "return `num_output_tokens`", "false"),
    Field("return_num_cached_tokens", "BOOL", "return `num_cached_tokens`", "false"),
    Field(
        "exclude_input_in_output",
        "BOOL",
        "false: the prompt in front of the answer (never in streams)",
        "a setting, true",
    ),
    Field(
        "guided_decoding_guide_type",
        "BYTES",
        f"what the answer must be: {', '.join(GUIDE_KINDS)}",
        "none",
        off=("",),
    ),
    Field(
        "guided_decoding_guide",
        "BYTES",
        "the schema, expression, grammar, JSON list of choices, or structural tag",
        "none",
        off=("",),
    ),
    Field(
        "lora_name",
        "BYTES",
        "the LoRA adapter in the folder of this name (the setting lora_dir)",
        "none",
        off=("",),
    ),
    Field(
        "lora_task_id",
        "UINT64",
        "the same where its name is a number above 0",
        "none",
        low=0,
        high=2**64 - 1,
        off=(0,),
    ),
    Field("priority", "INT32", "lower runs sooner and is preempted later", "0", low=-_INT32, high=_INT32),
    Field(
        "timeout_ms",
        "INT32",
        "ends the request so long after its arrival; 0: never",
        "none",
        low=0,
        high=_INT32,
        off=(0,),
    ),
    Field("cache_salt", "BYTES", "prompts with different salts never share cached blocks", "none"),
    Field("user", "BYTES", "who asks: of the same priority, different users take turns", "none"),
    Field("traceparent", "BYTES", "W3C trace context of the client's span, in which the server's spans are"),
    Field("cancel", "BOOL", "with the request_id of running requests: ends them", "false"),
    Field(
        "sampling_parameters",
        "BYTES",
        "JSON object with any field of this table by name; numbers may be strings",
        kind="object",
        is_prompt=True,
    ),
    unsupported("decoder_text_input", "BYTES", off=("",)),
    unsupported("prompt_embedding_table", "FP16", num_dims=2),
    unsupported("prompt_vocab_size", "INT32", off=(0,)),
    unsupported("prompt_table_extra_id", "UINT64", num_dims=1),
    unsupported("lora_weights", "FP16", num_dims=2),
    unsupported("lora_config", "INT32", num_dims=2),
)

# Names that are no tensors: `n` is the JSON name, `logprobs` the name of an output, and the faces map the
# others.
_NO_TENSORS = {"n", "logprobs", "runtime_top_k", "runtime_top_p", "len_penalty", "return_cumulative_logprob"}


def tensor_fields() -> list[tuple[str, Field]]:
    """(tensor name, field) of every input tensor, aliases included."""
    return [(name, field) for field in FIELDS for name in field.names if name not in _NO_TENSORS]
