"""All settings: one frozen object whose fields carry type, bounds and a sentence.

Flags and documentation are made from it.

A server reads them from `pagetide.json` in its model repository; `scripts/serve.sh` writes that file from
its options.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

SETTINGS_FILE = "pagetide.json"


class SettingsError(ValueError):
    """A setting has a value that is not allowed."""


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that a person can choose; every default works."""

    model: Annotated[
        str,
        Meta(
            description=(
                "Hugging Face directory or hub id, or a .gguf file; empty: the embedded SmolLM2-135M-Instruct"
            )
        ),
    ] = ""
    load_format: Annotated[
        Literal["auto", "dummy"],
        Meta(description="dummy: random weights of the model's shapes, as in vLLM (to measure with)"),
    ] = "auto"
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"],
        Meta(description="type of weights and KV cache; auto: bfloat16"),
    ] = "auto"
    quantization: Annotated[
        Literal["none", "w8a16", "w8a8", "w4a16", "w4a8", "fp8"],
        Meta(
            description="bits to which matrices (w) are rounded at load, in groups of 32 inputs with a scale "
            "of their own, the head's always to 8; and bits to which the activations (a) that they multiply "
            "may be rounded, which GPUs do not do. What a GGUF file has in as many bits stays as it is. fp8: "
            "on a GPU that has it, FP8 (e4m3) with a scale for each output, the head as it is. none: as the "
            "checkpoint is (GPTQ, AWQ, compressed-tensors and FP8 are read), GGUF files as bfloat16"
        ),
    ] = "none"
    tensor_parallel_size: Annotated[
        int,
        Meta(
            ge=1,
            le=64,
            description="ranks that share the model, each a process with a GPU, or a share of the CPU's "
            "cores, of its own",
        ),
    ] = 1
    ranks_per_node: Annotated[
        int,
        Meta(ge=0, le=64, description="ranks on each machine; 0: all are on this one"),
    ] = 0
    rendezvous: Annotated[
        str,
        Meta(
            description="host:port of this machine where ranks on other machines meet the engine, on a "
            "network that nobody else can reach; empty: all ranks are on this machine"
        ),
    ] = ""
    device: Annotated[Literal["auto", "cpu", "cuda"], Meta(description="auto: a GPU if there is one")] = (
        "auto"
    )
    max_model_len: Annotated[
        int,
        Meta(
            ge=0,
            description=(
                "longest prompt plus answer in tokens; 0: the model's own, as far as the cache holds it"
            ),
        ),
    ] = 0
    max_num_seqs: Annotated[
        int,
        Meta(ge=0, le=4096, description="sequences that run at the same time; 0: 32 on a CPU, 256 on a GPU"),
    ] = 0
    max_num_batched_tokens: Annotated[
        int, Meta(ge=0, description="token budget of one engine step; 0: 512 on a CPU, 8192 on a GPU")
    ] = 0
    max_queued_requests: Annotated[
        int, Meta(ge=1, description="requests that wait or run before new ones are refused")
    ] = 4096
    max_queue_s: Annotated[
        float,
        Meta(
            ge=0,
            description="seconds that a request may wait before it runs: one that would wait longer is "
            "refused at once, with the time to come back; 0: no limit",
        ),
    ] = 0.0
    max_output_tokens: Annotated[
        int, Meta(ge=1, description="cap on max_tokens where a request names none")
    ] = 4096
    block_size: Annotated[int, Meta(ge=1, le=256, description="tokens in a KV cache block")] = 16
    num_blocks: Annotated[
        int, Meta(ge=0, description="KV cache blocks; 0: as many as kv_cache_gb or gpu_memory_fraction allow")
    ] = 0
    kv_cache_gb: Annotated[float, Meta(gt=0, description="KV cache on a CPU, in GiB")] = 2.0
    gpu_memory_fraction: Annotated[
        float,
        Meta(
            gt=0,
            le=1,
            description="share of what a GPU has free beside the weights, for KV cache and largest steps",
        ),
    ] = 0.85
    kv_cache_dtype: Annotated[
        Literal["auto", "int8", "fp8"],
        Meta(
            description="int8: on a CPU, keys and values are kept as 8-bit integers, with a scale for each "
            "token and head, in little more than half the memory of bfloat16; fp8: on a GPU that has it, as "
            "FP8 (e4m3), with the scales of the checkpoint if it has them, in half; auto: as dtype"
        ),
    ] = "auto"
    swap_space_gb: Annotated[
        float,
        Meta(
            ge=0,
            description="on a GPU, host memory in GiB that keeps KV blocks which the device has no room for: "
            "evicted prefixes and preempted sequences; 0: none",
        ),
    ] = 0.0
    enable_prefix_caching: Annotated[
        bool, Meta(description="share cached blocks between prompts that begin alike")
    ] = True
    batching: Annotated[
        Literal["continuous", "static"],
        Meta(description="static: a batch ends before the next begins (the benchmark's baseline)"),
    ] = "continuous"
    kv_reservation: Annotated[
        Literal["paged", "contiguous"],
        Meta(
            description=(
                "contiguous: blocks for the longest possible answer at once (the benchmark's baseline)"
            )
        ),
    ] = "paged"
    lora_dir: Annotated[
        str,
        Meta(
            description="folder of LoRA adapters that requests may name, one folder each, as PEFT writes "
            "them (adapter_config.json, adapter_model.safetensors); they are read when they are first "
            "asked for, also those that come later; empty: none"
        ),
    ] = ""
    max_loras: Annotated[
        int,
        Meta(
            ge=1,
            le=256,
            description="adapters that sequences can have at the same time; memory for so many is taken at "
            "start, and on a GPU every recorded step does the work for all",
        ),
    ] = 4
    max_lora_rank: Annotated[int, Meta(ge=1, le=512, description="largest rank of an adapter")] = 32
    num_speculative_tokens: Annotated[
        int,
        Meta(
            ge=0,
            le=64,
            description="speculative decoding: up to so many next tokens of a sequence are guessed, and "
            "verified in one step, as far as that pays beside the others that run. Answers stay the same, "
            "token by token, on the CPU's kernels; elsewhere near ties may fall another way; 0: none",
        ),
    ] = 0
    prompt_lookup_min: Annotated[
        int,
        Meta(
            ge=1,
            le=16,
            description="what is guessed is what followed the last so many tokens where they stood before, "
            "in the prompt or in the answer",
        ),
    ] = 3
    ops: Annotated[
        Literal["auto", "reference", "triton"],
        Meta(
            description="reference: plain torch operations instead of the device's kernels; triton: the "
            "GPU's kernels, which a CPU runs in the Triton language's interpreter (for tests)"
        ),
    ] = "auto"
    attention_backend: Annotated[
        Literal["auto", "triton", "flashinfer", "flash_attn_4"],
        Meta(
            description="on a GPU, what attends to prompt chunks: triton: the engine's own kernels; "
            "flashinfer, flash_attn_4: these libraries, if they are installed; auto: triton. Steps in which "
            "each sequence has one token always use the engine's own"
        ),
    ] = "auto"
    cuda_graphs: Annotated[
        bool,
        Meta(description="on a GPU, decode steps are recorded at start, and replayed by one launch each"),
    ] = True
    deterministic: Annotated[
        bool,
        Meta(
            description="refuse to start where a request's tokens and log-probabilities could depend, in "
            "their last bits, on what runs beside it, on chunks, cached prefixes or preemption: anywhere but "
            "on the CPU's kernels, which never let them, on one or two ranks"
        ),
    ] = False
    num_threads: Annotated[int, Meta(ge=0, description="CPU threads of the engine; 0: one for each core")] = 0
    check_integrity: Annotated[
        bool, Meta(description="check the block accounting after every step (for tests)")
    ] = False
    default_sampling: Annotated[
        Literal["vllm", "trtllm"],
        Meta(
            description="trtllm: requests without top_k, top_p, min_p and seed are greedy, as in TensorRT-LLM"
        ),
    ] = "vllm"
    generation_config: Annotated[
        Literal["model", "none"],
        Meta(description="model: sampling defaults of the model's generation_config.json, as in vLLM"),
    ] = "model"
    chat_template: Annotated[
        str, Meta(description="Jinja chat template, or the file that holds it, in place of the model's own")
    ] = ""
    allow_logits: Annotated[
        bool,
        Meta(description="allow return_context_logits and return_generation_logits, whose answers are large"),
    ] = False
    log_requests: Annotated[
        bool,
        Meta(
            description="one line of the log for each request when it ends, as JSON: counts of tokens, times "
            "and how it ended; never what was said"
        ),
    ] = False
    otlp_traces_endpoint: Annotated[
        str,
        Meta(
            description="an OpenTelemetry collector's URL for traces (OTLP over HTTP, such as "
            "http://localhost:4318/v1/traces): each request's spans are sent there"
        ),
    ] = ""
    metric_names: Annotated[
        Literal["pagetide", "vllm", "trtllm"],
        Meta(description="vllm, trtllm: metrics under the names of that engine's dashboards too"),
    ] = "pagetide"
    exclude_input_in_output: Annotated[
        bool, Meta(description="default of the request field of this name")
    ] = True
    engine_start_timeout_s: Annotated[
        float, Meta(gt=0, description="seconds that the engine may take to load")
    ] = 600.0
    step_timeout_s: Annotated[
        float,
        Meta(
            ge=0,
            description="seconds that a step of the engine may take, and that its process may give no sign "
            "of life, before it is ended and started again; 0: no limit",
        ),
    ] = 300.0
    repeat_interrupted: Annotated[
        bool,
        Meta(
            description="requests that had not been answered when the engine ended are put to the next one, "
            "once: their clients see a delay; false: they get an error"
        ),
    ] = True
    cache_dir: Annotated[str, Meta(description="converted models are kept here; ~ is expanded")] = (
        "~/.cache/pagetide"
    )

    keep_packed_weights: Annotated[
        bool,
        Meta(
            description="on a CPU, weights are kept under cache_dir as kernels take them, which takes their "
            "size on disk: of converted models, and of those above 500 MB"
        ),
    ] = True

    @property
    def local_size(self) -> int:
        """Ranks on each machine."""
        return self.ranks_per_node or self.tensor_parallel_size

    def sized_for(self, device: str) -> Settings:
        """These settings with the batch sizes that suit the kind of device, `cpu` or `cuda`, where none are
        chosen.
        """
        seqs, tokens = (256, 8192) if device == "cuda" else (32, 512)
        return msgspec.structs.replace(
            self,
            max_num_seqs=self.max_num_seqs or seqs,
            max_num_batched_tokens=self.max_num_batched_tokens or tokens,
        )

    @property
    def cache_path(self) -> Path:
        """The folder of converted models, `~` expanded; in the folder for temporary files where a user has no
        home.
        """
        try:
            return Path(self.cache_dir).expanduser()
        except RuntimeError:  # a user without a home, as in many containers
            return Path(tempfile.gettempdir()) / f"pagetide-{os.getuid()}"


def make_settings(**values: Any) -> Settings:
    """Settings with these values, checked; raises SettingsError with the field and what is allowed."""
    try:
        return msgspec.convert(values, Settings, strict=True)
    except msgspec.ValidationError as error:
        raise SettingsError(
            str(error).replace("Object contains unknown field", "There is no setting called")
        ) from None


def read_settings(file: Path) -> Settings:
    """The settings in a JSON file; defaults where there is no such file. Raises SettingsError."""
    if not file.exists():
        return Settings()
    try:
        return msgspec.json.decode(file.read_bytes(), type=Settings)
    except msgspec.MsgspecError as error:
        raise SettingsError(f"{file}: {error}") from None


def settings_file(engine: str = "") -> str:
    """The file in a model repository that has an engine's settings; the engine without a name is the first
    one's.
    """
    return f"pagetide-{engine}.json" if engine else SETTINGS_FILE


class SettingsField(msgspec.Struct, frozen=True):
    """One setting as documentation and command lines need it."""

    name: str
    type: type
    choices: tuple[str, ...]
    default: Any
    description: str


def settings_fields() -> list[SettingsField]:
    """Every setting, in the order of the class."""
    fields = []
    defaults = Settings()
    for name, hint in get_type_hints(Settings, include_extras=True).items():
        kind, meta = get_args(hint)
        is_choice = get_origin(kind) is Literal
        fields.append(
            SettingsField(
                name,
                str if is_choice else kind,
                get_args(kind) if is_choice else (),
                getattr(defaults, name),
                meta.description,
            )
        )
    return fields
