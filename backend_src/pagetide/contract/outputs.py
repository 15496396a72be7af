"""ONE table of what a client may get: names, types, shapes, and which request field asks for each output.

The models' config.pbtxt, the README and the packing of responses are made from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

_NUMPY: dict[str, Any] = {
    "BOOL": np.bool_,
    "FP32": np.float32,
    "INT32": np.int32,
    "INT64": np.int64,
    "UINT32": np.uint32,
    "UINT64": np.uint64,
    "BYTES": np.object_,
}


@dataclass(frozen=True)
class OutputField:
    """One output of `llm` and `ensemble`. dtype: Triton's. dims: of one row of the batch.

    asked_by: the request field without which it is not there; empty: always there.
    """

    name: str
    dtype: str
    dims: str
    sentence: str
    asked_by: str = ""

    @property
    def numpy_dtype(self) -> Any:
        return _NUMPY[self.dtype]


def _perf(name: str, dtype: str, sentence: str) -> OutputField:
    return OutputField(name, dtype, "1", sentence, "return_perf_metrics")


OUTPUTS = (
    OutputField("output_ids", "INT32", "1, -1", "new token ids; shorter rows end in `pad_id`"),
    OutputField("sequence_length", "INT32", "1", "how many of them count"),
    OutputField("finish_reason", "BYTES", "1", "empty, or in the last response why the answer ended"),
    OutputField("batch_index", "INT32", "1", "which prompt of the request"),
    OutputField("sequence_index", "INT32", "1", "which answer to it"),
    OutputField("response_index", "INT32", "1", "which response of that answer, from 0"),
    OutputField("num_input_tokens", "INT32", "1", "of the prompt", "return_num_input_tokens"),
    OutputField("num_output_tokens", "INT32", "1", "of this response", "return_num_output_tokens"),
    OutputField(
        "num_cached_tokens", "INT32", "1", "of the prompt, found in the cache", "return_num_cached_tokens"
    ),
    OutputField("cum_log_probs", "FP32", "1", "log-probability of the answer so far", "return_log_probs"),
    OutputField("output_log_probs", "FP32", "1, -1", "of each new token", "return_log_probs"),
    OutputField("logprobs", "BYTES", "1", "JSON: vLLM's `logprobs` and `prompt_logprobs`", "logprobs"),
    _perf("kv_cache_reused_blocks", "INT32", "blocks of the prompt that were cached"),
    _perf("kv_cache_alloc_new_blocks", "INT32", "blocks of the prompt that were new"),
    _perf("kv_cache_alloc_total_blocks", "INT32", "both together"),
    _perf("arrival_time_ns", "INT64", "on the server's monotonic clock"),
    _perf("first_scheduled_time_ns", "INT64", "when the prompt's first step was planned"),
    _perf("first_token_time_ns", "INT64", "when the first token was known"),
    _perf("last_token_time_ns", "INT64", "when the last token was known"),
    _perf("acceptance_rate", "FP32", "share of the draft tokens that were right; 0 if there were none"),
    _perf("total_accepted_draft_tokens", "INT32", "of all answers to the request so far"),
    _perf("total_draft_tokens", "INT32", "guesses of next tokens, with `num_speculative_tokens`"),
    OutputField(
        "context_logits", "FP32", "-1, -1", "[prompt tokens, vocabulary], once", "return_context_logits"
    ),
    OutputField(
        "generation_logits", "FP32", "1, -1, -1", "[1, tokens, vocabulary]", "return_generation_logits"
    ),
)
# What only `postprocessing` gets, beside output_ids and sequence_length.
TEXT_OUTPUTS = (
    OutputField("text_cut", "INT32", "1", "bytes at the end of the text that do not count"),
    OutputField("request_number", "UINT64", "1", "the engine's number, by which a client's leaving is told"),
    OutputField("chunk_number", "UINT64", "1", "of every eighth chunk, by which its passing is told"),
    OutputField("prompt_text", "BYTES", "1", "what stands in front of the answer"),
    OutputField("skip_special_tokens", "BOOL", "1", "whether special tokens have no text"),
)
# What only the face vllm_model maps: its clients expect other types and shapes. It alone has this beginning.
VLLM = "vllm_"
VLLM_OUTPUTS = (
    OutputField(
        f"{VLLM}finish_reason", "BYTES", "-1", "`None` until the answer ends", "return_finish_reason"
    ),
    OutputField(f"{VLLM}cumulative_logprob", "FP32", "-1", "of the answer so far", "return_log_probs"),
    OutputField(f"{VLLM}logprobs", "BYTES", "-1", "JSON, or null", "return_logprobs"),
    OutputField(f"{VLLM}num_input_tokens", "UINT32", "-1", "of the prompt", "return_num_input_tokens"),
    OutputField(f"{VLLM}num_output_tokens", "UINT32", "-1", "of this response", "return_num_output_tokens"),
)
ALL_OUTPUTS = {output.name: output for output in (*OUTPUTS, *TEXT_OUTPUTS, *VLLM_OUTPUTS)}
