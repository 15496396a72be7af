"""The names under which clients of other backends know fields and outputs: faces are renaming, and nothing
else.
"""

from __future__ import annotations

# TensorRT-LLM's `preprocessing`, whose clients chain the steps by hand: its name of a field.
PREPROCESSING_NAMES = {"text_input": "QUERY", "max_tokens": "REQUEST_OUTPUT_LEN"}
# Its outputs, by which `llm` calls them.
PREPROCESSED = {"INPUT_ID": "input_ids", "REQUEST_INPUT_LEN": "input_lengths", "PARAMS": "PARAMS"}
# TensorRT-LLM's `postprocessing`: its name of an output of `llm`.
POSTPROCESSING_NAMES = {
    "output_ids": "TOKENS_BATCH",
    "sequence_length": "SEQUENCE_LENGTH",
    "text_cut": "TEXT_CUT",
    "request_number": "REQUEST_NUMBER",
    "chunk_number": "CHUNK_NUMBER",
    "prompt_text": "PROMPT_TEXT",
    "skip_special_tokens": "SKIP_SPECIAL_TOKENS",
}
# What only passes `postprocessing`, on its way from `llm` to a face: its name there, and in the face. Were
# the same tensor an output of the face and an input of postprocessing, Triton would count it twice when it
# leaves out the steps that nobody asks for, and leave out llm too, for a client who wants only ids, say.
# And inside an ensemble only postprocessing is told of a client that has gone.
PASSED = {"IDS": "output_ids", "LENGTH": "sequence_length"}
# TensorRT-LLM's core model: its name of a field, where it is another one.
CORE_NAMES = {
    "max_tokens": "request_output_len",
    "stream": "streaming",
    "cancel": "stop",
    "top_k": "runtime_top_k",
    "top_p": "runtime_top_p",
    "length_penalty": "len_penalty",
}
# A prompt of the face vllm_model, whose defaults are others, comes to `preprocessing` under this name.
VLLM_PROMPT = "VLLM_QUERY"
# What clients of Triton's vLLM backend send: (name, Triton's type, name in `preprocessing`).
VLLM_INPUTS = (
    ("text_input", "BYTES", VLLM_PROMPT),
    ("stream", "BOOL", "stream"),
    ("sampling_parameters", "BYTES", "sampling_parameters"),
    ("exclude_input_in_output", "BOOL", "exclude_input_in_output"),
    ("return_finish_reason", "BOOL", "return_finish_reason"),
    ("return_cumulative_logprob", "BOOL", "return_log_probs"),
    ("return_logprobs", "BOOL", "return_logprobs"),
    ("return_num_input_tokens", "BOOL", "return_num_input_tokens"),
    ("return_num_output_tokens", "BOOL", "return_num_output_tokens"),
)
