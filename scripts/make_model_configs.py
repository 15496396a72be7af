"""Writes model_repository/*/config.pbtxt from the contract's table. A test keeps the files and the table together.

python scripts/make_model_configs.py [--check]
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "backend_src"))

from pagetide.serving.contract import tensor_fields

REPOSITORY = Path(__file__).parents[1] / "model_repository"
MAX_BATCH = 1024
HEADER = "# Written by scripts/make_model_configs.py from backend_src/pagetide/serving/contract.py.\n"

# Preprocessing and postprocessing speak TensorRT-LLM's names, whose clients chain the steps by hand.
PREPROCESSING_NAMES = {"text_input": "QUERY", "max_tokens": "REQUEST_OUTPUT_LEN"}

# Outputs of llm: (name, type, dims).
OUTPUTS = [
    ("output_ids", "INT32", "1, -1"),
    ("sequence_length", "INT32", "1"),
    ("finish_reason", "BYTES", "1"),
    ("batch_index", "INT32", "1"),
    ("sequence_index", "INT32", "1"),
    ("response_index", "INT32", "1"),
    ("num_input_tokens", "INT32", "1"),
    ("num_output_tokens", "INT32", "1"),
    ("num_cached_tokens", "INT32", "1"),
]
# What postprocessing needs beside the ids: its name there by its name in llm.
TO_POSTPROCESSING = {
    "output_ids": ("TOKENS_BATCH", "INT32", "1, -1"),
    "sequence_length": ("SEQUENCE_LENGTH", "INT32", "1"),
    "text_cut": ("TEXT_CUT", "INT32", "1"),
    "request_number": ("REQUEST_NUMBER", "UINT64", "1"),
    "prompt_text": ("PROMPT_TEXT", "BYTES", "1"),
}
PREPROCESSED = {"INPUT_ID": "input_ids", "REQUEST_INPUT_LEN": "input_lengths", "PARAMS": "PARAMS"}


def triton_type(dtype: str) -> str:
    return "TYPE_STRING" if dtype == "BYTES" else f"TYPE_{dtype}"


def tensor(name: str, dtype: str, dims: object, optional: bool = False) -> str:
    return f'  {{ name: "{name}" data_type: {triton_type(dtype)} dims: [ {dims} ]{" optional: true" if optional else ""} }}'


def block(kind: str, tensors: list[str]) -> str:
    return f"{kind} [\n" + ",\n".join(tensors) + "\n]\n"


def head(name: str, backend: str) -> str:
    return f'{HEADER}name: "{name}"\n{backend}\nmax_batch_size: {MAX_BATCH}\n'


def python_model(name: str, inputs: list[str], outputs: list[str], extra: str = "") -> str:
    instances = "instance_group [ { kind: KIND_CPU count: 1 } ]\n"
    return head(name, 'backend: "python"') + block("input", inputs) + block("output", outputs) + instances + extra


def preprocessing() -> str:
    inputs = [tensor(PREPROCESSING_NAMES.get(name, name), f.dtype, f.dims, optional=True) for name, f in tensor_fields()]
    outputs = [tensor("INPUT_ID", "INT32", -1), tensor("REQUEST_INPUT_LEN", "INT32", 1), tensor("PARAMS", "BYTES", 1)]
    return python_model("preprocessing", inputs, outputs)


def llm(name: str, is_decoupled: bool) -> str:
    texts = {"text_input", "messages", "tools", "add_generation_prompt", "chat_template_kwargs"}
    inputs = [tensor(n, f.dtype, f.dims, optional=True) for n, f in tensor_fields() if n not in texts]
    inputs += [tensor("input_lengths", "INT32", 1, optional=True), tensor("PARAMS", "BYTES", 1, optional=True)]
    outputs = [tensor(n, dtype, dims) for n, dtype, dims in OUTPUTS]
    known = {n for n, _, _ in OUTPUTS}
    outputs += [tensor(n, dtype, dims) for n, (_, dtype, dims) in TO_POSTPROCESSING.items() if n not in known]
    return python_model(name, inputs, outputs, "model_transaction_policy { decoupled: True }\n" if is_decoupled else "")


def postprocessing() -> str:
    # The number of beams is free: clients that chain the steps by hand may bring several.
    inputs = [
        tensor(n, dtype, {"TOKENS_BATCH": "-1, -1", "SEQUENCE_LENGTH": "-1"}.get(n, dims), optional=True)
        for n, dtype, dims in TO_POSTPROCESSING.values()
    ]
    warning = (
        "# Exactly one instance and no dynamic_batching: Triton pairs responses by order of arrival, and before release 26.02\n"
        "# a dynamic batcher here would keep every cancelled stream in flight for ever.\n"
    )
    return warning + python_model("postprocessing", inputs, [tensor("OUTPUT", "BYTES", 1)])


def step(model: str, inputs: dict[str, str], outputs: dict[str, str]) -> str:
    lines = [f'      input_map {{ key: "{key}" value: "{value}" }}' for key, value in inputs.items()]
    lines += [f'      output_map {{ key: "{key}" value: "{value}" }}' for key, value in outputs.items()]
    return f'    {{\n      model_name: "{model}"\n      model_version: -1\n' + "\n".join(lines) + "\n    }"


def ensemble(name: str, engine: str) -> str:
    inputs = [tensor(n, f.dtype, f.dims, optional=True) for n, f in tensor_fields()]
    outputs = [tensor("text_output", "BYTES", 1)] + [tensor(n, dtype, dims) for n, dtype, dims in OUTPUTS]
    steps = [
        step(
            "preprocessing",
            {PREPROCESSING_NAMES.get(n, n): n for n, _ in tensor_fields()},
            {theirs: f"_{theirs}" for theirs in PREPROCESSED},
        ),
        step(
            engine,
            {ours: f"_{theirs}" for theirs, ours in PREPROCESSED.items()},
            {n: n for n, _, _ in OUTPUTS} | {n: f"_{n}" for n in TO_POSTPROCESSING if n not in {o[0] for o in OUTPUTS}},
        ),
        step(
            "postprocessing",
            {theirs: n if n in {o[0] for o in OUTPUTS} else f"_{n}" for n, (theirs, _, _) in TO_POSTPROCESSING.items()},
            {"OUTPUT": "text_output"},
        ),
    ]
    scheduling = "ensemble_scheduling {\n  step [\n" + ",\n".join(steps) + "\n  ]\n}\n"
    return head(name, 'platform: "ensemble"') + block("input", inputs) + block("output", outputs) + scheduling


def configs() -> dict[str, str]:
    """config.pbtxt of every model by its name."""
    return {
        "preprocessing": preprocessing(),
        "llm": llm("llm", is_decoupled=True),
        "llm_unary": llm("llm_unary", is_decoupled=False),
        "postprocessing": postprocessing(),
        "ensemble": ensemble("ensemble", "llm"),
        "ensemble_unary": ensemble("ensemble_unary", "llm_unary"),
    }


def main() -> int:
    stale = []
    for name, text in configs().items():
        file = REPOSITORY / name / "config.pbtxt"
        if not file.exists() or file.read_text() != text:
            stale.append(name)
            if "--check" not in sys.argv:
                (REPOSITORY / name / "1").mkdir(parents=True, exist_ok=True)
                file.write_text(text)
    print(f"changed: {', '.join(stale) or 'none'}")
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
