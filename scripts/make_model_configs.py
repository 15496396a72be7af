"""Writes model_repository/*/config.pbtxt from the contract's table.

A test keeps the files and the table together.

python scripts/make_model_configs.py [--check]
"""

from __future__ import annotations

import sys
from collections.abc import Container, Mapping
from pathlib import Path
from types import MappingProxyType

sys.path.insert(0, str(Path(__file__).parents[1] / "backend_src"))

from pagetide.contract.faces import (
    CORE_NAMES,
    PASSED,
    POSTPROCESSING_NAMES,
    PREPROCESSED,
    PREPROCESSING_NAMES,
    VLLM_INPUTS,
    VLLM_PROMPT,
)
from pagetide.contract.fields import tensor_fields
from pagetide.contract.outputs import ALL_OUTPUTS, OUTPUTS, VLLM, VLLM_OUTPUTS, OutputField

REPOSITORY = Path(__file__).parents[1] / "model_repository"
MAX_BATCH = 1024
HEADER = "# Written by scripts/make_model_configs.py from backend_src/pagetide/contract/fields.py.\n"

TEXT_FIELDS = {"text_input", "messages", "tools", "add_generation_prompt", "chat_template_kwargs"}


def triton_type(dtype: str) -> str:
    return "TYPE_STRING" if dtype == "BYTES" else f"TYPE_{dtype}"


def tensor(name: str, dtype: str, dims: object, optional: bool = False) -> str:
    rest = " optional: true" if optional else ""
    return f'  {{ name: "{name}" data_type: {triton_type(dtype)} dims: [ {dims} ]{rest} }}'


def output_tensor(output: OutputField) -> str:
    return tensor(output.name.removeprefix(VLLM), output.dtype, output.dims)


def block(kind: str, tensors: list[str]) -> str:
    return f"{kind} [\n" + ",\n".join(tensors) + "\n]\n"


def python_model(name: str, inputs: list[str], outputs: list[str], extra: str = "") -> str:
    instances = "instance_group [ { kind: KIND_CPU count: 1 } ]\n"
    head = f'{HEADER}name: "{name}"\nbackend: "python"\nmax_batch_size: {MAX_BATCH}\n'
    return head + block("input", inputs) + block("output", outputs) + instances + extra


def field_inputs(names: Mapping[str, str] = MappingProxyType({}), without: Container[str] = ()) -> list[str]:
    """Every field of the contract as an input, under another name where names has one."""
    return [
        tensor(names.get(n, n), f.dtype, f.dims, optional=True)
        for n, f in tensor_fields()
        if n not in without
    ]


def preprocessing() -> str:
    inputs = [*field_inputs(PREPROCESSING_NAMES), tensor(VLLM_PROMPT, "BYTES", 1, optional=True)]
    outputs = [
        tensor("INPUT_ID", "INT32", -1),
        tensor("REQUEST_INPUT_LEN", "INT32", 1),
        tensor("PARAMS", "BYTES", 1),
    ]
    return python_model("preprocessing", inputs, outputs)


def llm(name: str, is_decoupled: bool) -> str:
    inputs = field_inputs(without=TEXT_FIELDS)
    inputs += [
        tensor("input_lengths", "INT32", 1, optional=True),
        tensor("PARAMS", "BYTES", 1, optional=True),
    ]
    outputs = [tensor(output.name, output.dtype, output.dims) for output in ALL_OUTPUTS.values()]
    return python_model(
        name, inputs, outputs, "model_transaction_policy { decoupled: True }\n" if is_decoupled else ""
    )


def postprocessing() -> str:
    # The number of beams is free: clients that chain the steps by hand may bring several.
    free = {"output_ids": "-1, -1", "sequence_length": "-1"}
    taken = {theirs: ALL_OUTPUTS[name] for name, theirs in POSTPROCESSING_NAMES.items()}
    inputs = [tensor(n, o.dtype, free.get(o.name, o.dims), optional=True) for n, o in taken.items()]
    warning = (
        "# Exactly one instance and no dynamic_batching: Triton pairs responses by order of "
        "arrival, and before release 26.02\n"
        "# a dynamic batcher here would keep every cancelled stream in flight for ever.\n"
    )
    outputs = [
        tensor("OUTPUT", "BYTES", 1),
        tensor("IDS", "INT32", "-1, -1"),
        tensor("LENGTH", "INT32", "-1"),
    ]
    return warning + python_model("postprocessing", inputs, outputs)


def step(model: str, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> str:
    lines = [f'      input_map {{ key: "{key}" value: "{value}" }}' for key, value in inputs.items()]
    lines += [f'      output_map {{ key: "{key}" value: "{value}" }}' for key, value in outputs.items()]
    return f'    {{\n      model_name: "{model}"\n      model_version: -1\n' + "\n".join(lines) + "\n    }"


def steps(
    preprocessing_inputs: dict[str, str],
    engine: str,
    outputs: dict[str, str],
    passed: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """The three steps of a face.

    outputs: names in the face by those of llm; passed: by those of postprocessing.
    """
    to_post = {n: f"_{n}" for n in POSTPROCESSING_NAMES}
    from_llm = {theirs: to_post[n] for n, theirs in POSTPROCESSING_NAMES.items()}
    all_steps = [
        step("preprocessing", preprocessing_inputs, {theirs: f"_{theirs}" for theirs in PREPROCESSED}),
        step(engine, {ours: f"_{theirs}" for theirs, ours in PREPROCESSED.items()}, outputs | to_post),
        step("postprocessing", from_llm, {"OUTPUT": "text_output", **passed}),
    ]
    return scheduling(all_steps)


def scheduling(all_steps: list[str]) -> str:
    return "ensemble_scheduling {\n  step [\n" + ",\n".join(all_steps) + "\n  ]\n}\n"


def ensemble(engine: str) -> str:
    outputs = [tensor("text_output", "BYTES", 1)] + [output_tensor(output) for output in OUTPUTS]
    names = {PREPROCESSING_NAMES.get(n, n): n for n, _ in tensor_fields()}
    direct = {o.name: o.name for o in OUTPUTS if o.name not in PASSED.values()}
    return face(field_inputs(), outputs, steps(names, engine, direct, PASSED))


def tensorrt_llm(engine: str) -> str:
    """TensorRT-LLM's core model: token ids in, token ids out, by renaming."""
    fields = [(n, f) for n, f in tensor_fields() if n not in TEXT_FIELDS | {"stop"}]
    inputs = [tensor(CORE_NAMES.get(n, n), f.dtype, f.dims, optional=True) for n, f in fields]
    inputs.append(tensor("input_lengths", "INT32", 1, optional=True))
    maps = {n: CORE_NAMES.get(n, n) for n, _ in fields} | {"input_lengths": "input_lengths"}
    outputs = {o.name: o.name for o in OUTPUTS}
    if engine == "llm_unary":
        return face(inputs, [output_tensor(o) for o in OUTPUTS], scheduling([step(engine, maps, outputs)]))
    seen = {n: f"_{n}" for n in ("output_ids", "sequence_length", "request_number", "chunk_number")}
    passing = step("postprocessing", {POSTPROCESSING_NAMES[n]: name for n, name in seen.items()}, PASSED)
    return face(
        inputs, [output_tensor(o) for o in OUTPUTS], scheduling([step(engine, maps, outputs | seen), passing])
    )


def vllm_model() -> str:
    """The vLLM backend's model: one-dimensional tensors without a batch."""
    inputs = [tensor(n, dtype, 1, optional=n != "text_input") for n, dtype, _ in VLLM_INPUTS]
    outputs = [tensor("text_output", "BYTES", -1)] + [output_tensor(output) for output in VLLM_OUTPUTS]
    maps = {theirs: n for n, _, theirs in VLLM_INPUTS}
    return face(
        inputs,
        outputs,
        steps(maps, "llm", {o.name: o.name.removeprefix(VLLM) for o in VLLM_OUTPUTS}),
        max_batch=0,
    )


def face(inputs: list[str], outputs: list[str], scheduling: str, max_batch: int = MAX_BATCH) -> str:
    # Without a name, so that the folder may be copied under another one.
    return (
        f'{HEADER}platform: "ensemble"\nmax_batch_size: {max_batch}\n'
        + block("input", inputs)
        + block("output", outputs)
        + scheduling
    )


def configs() -> dict[str, str]:
    """config.pbtxt of every model by its name."""
    return {
        "preprocessing": preprocessing(),
        "llm": llm("llm", is_decoupled=True),
        "llm_unary": llm("llm_unary", is_decoupled=False),
        "postprocessing": postprocessing(),
        "ensemble": ensemble("llm"),
        "ensemble_unary": ensemble("llm_unary"),
        "tensorrt_llm": tensorrt_llm("llm"),
        "tensorrt_llm_unary": tensorrt_llm("llm_unary"),
        "vllm_model": vllm_model(),
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
