"""Puts an engine together from settings: model, device, cache, scheduler.

The one place in engine/ that knows torch.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from pagetide.config import Settings, SettingsError
from pagetide.engine.adapters import AdapterFolder
from pagetide.engine.blocks import BlockManager
from pagetide.engine.drafts import Speculation
from pagetide.engine.engine import Engine, StepRunner
from pagetide.engine.groups import ModelLimits
from pagetide.engine.guides import GrammarCompiler
from pagetide.engine.host_blocks import HostBlocks
from pagetide.engine.ranks import check_nodes, start_ranks
from pagetide.engine.scheduler import Scheduler
from pagetide.kv_cache.store import make_store
from pagetide.models.adapters import adapter_version, read_adapter
from pagetide.models.config import DecoderConfig
from pagetide.models.decoder import Decoder, layer_shape
from pagetide.models.families import Family, read_model
from pagetide.models.sharding import make_shard
from pagetide.models.source import find_codes, find_model, packed_folder
from pagetide.models.weights import Checkpoint, Fp8AtLoad, QuantizedAtLoad, RandomTensors, Tensors
from pagetide.ops.adapters import NO_ADAPTERS, AdapterRoom
from pagetide.ops.comm import ALONE, Comm
from pagetide.ops.select import select_ops
from pagetide.ops.table import Ops
from pagetide.runner.device import Device, select_device
from pagetide.runner.ranks import LeadingRunner
from pagetide.runner.rows import Rows
from pagetide.runner.runner import Runner
from pagetide.text.tokens import Vocabulary
from pagetide.types import EngineInfo


@dataclass(frozen=True)
class Model:
    """What is known of a model before its weights are read."""

    path: Path
    family: Family
    config: DecoderConfig
    vocabulary: Vocabulary

    @classmethod
    def find(cls, settings: Settings) -> Model:
        """The one that the settings name. Raises UnsupportedModelError."""
        path = find_model(settings.model, settings.cache_path)
        family, config = read_model(path)
        vocabulary = Vocabulary.read(path)
        if vocabulary.full:
            # Rows beyond the tokenizer's are padding: whatever they say has no text.
            config = replace(config, vocab_size=min(config.vocab_size, len(vocabulary.full)))
        return cls(path, family, config, vocabulary)


def assemble(settings: Settings, on_lost: Callable[[str], None] | None = None) -> Engine:
    """Loads the model and makes everything ready for the first request.

    on_lost: called from another thread, with the reason, when a rank other than this one ends by itself;
    without it, the next step raises on a CPU (on GPUs a step that waits for NCCL does not).

    Raises SettingsError, UnsupportedModelError, RankError.
    """
    check_nodes(settings)
    _lora_folder(settings)
    model = Model.find(settings)
    if settings.tensor_parallel_size == 1:
        device = select_device(settings)
        rank = load_rank(settings, model, device, ALONE)
        return _make_engine(settings, model, rank, rank.runner)
    make_shard(model.config, 0, settings.tensor_parallel_size)
    with start_ranks(settings, on_lost) as ranks:
        device = select_device(settings)
        comm = ranks.join(device)
        rank = load_rank(settings, model, device, comm)
        return _make_engine(settings, model, rank, LeadingRunner(rank.runner, comm, ranks.wait))


class Rank(NamedTuple):
    """A loaded rank, and the sizes that all ranks have agreed on."""

    runner: Runner
    max_len: int
    num_blocks: int
    num_host_blocks: int


def load_rank(settings: Settings, model: Model, device: Device, comm: Comm) -> Rank:
    """Loads one rank's part of the model, and warms it up together with the others.

    Raises SettingsError, UnsupportedModelError.
    """
    # Kernels run on a thread of their own beside the loop's: without this, one could hold the interpreter
    # for 5 ms against the other.
    sys.setswitchinterval(2e-4)
    settings = settings.sized_for(device.torch_device.type)
    config, (dtype, kv_dtype) = model.config, _dtypes(settings, device)
    if dtype is torch.float16 and model.family.exceeds_float16:
        raise SettingsError("dtype is float16, which this model's values exceed; use bfloat16 or float32")
    shard = make_shard(config, comm.rank, comm.size)

    # Nothing may compute on this thread: a second OpenMP pool would make the first one sleep between its
    # kernels.
    def load(max_len: int) -> tuple[Ops, Decoder]:
        keeps = settings.keep_packed_weights and settings.load_format != "dummy"
        folder = packed_folder(model.path, settings.cache_path) if keeps else None
        ops = select_ops(device.torch_device, settings, dtype, model.path, folder, comm)
        checkpoint = _read_checkpoint(settings, model.path, dtype, device, model.family, config)
        room = AdapterRoom(settings.max_loras, settings.max_lora_rank) if settings.lora_dir else NO_ADAPTERS
        place = device.torch_device
        shape = layer_shape(shard.config, settings.block_size, max_len, place, kv_dtype, comm, room)
        activations = device.activation_dtype or dtype
        return ops, Decoder(shard, model.family, checkpoint, ops, shape, activations)

    longest = _longest(settings, config)
    ops, decoder = device.run(load, longest)
    if settings.deterministic and not (decoder.layers.is_deterministic and comm.size <= 2):
        raise SettingsError(
            "deterministic is true, which only the CPU's kernels are, on one or two ranks, with a model "
            "whose sizes they take; leave it out, or use device cpu with ops auto"
        )
    layout = decoder.kv_layout()
    block_bytes = layout.block_bytes
    # Ranks of one machine share its memory; each GPU has its own.
    host_bytes = comm.total(block_bytes) * settings.local_size // comm.size
    shared_bytes = host_bytes if device.torch_device.type == "cpu" else block_bytes

    def make_runner(num_blocks: int, num_host_blocks: int, max_len: int) -> Runner:
        place = device.torch_device
        store = device.run(make_store, layout, num_blocks, place, num_host_blocks)
        rows = device.run(Rows, settings.max_num_seqs, max_len, settings.block_size, config.vocab_size, place)
        return device.run(Runner, device, decoder, store, ops, rows, settings.block_size, comm)

    def try_steps() -> None:
        # Rows are as long as this needs: how long they can be is not known yet.
        num_tokens = min(settings.max_num_batched_tokens, longest - 1)
        speculation, num_sequences = _speculation(settings, device), settings.max_num_seqs
        most = speculation.most(settings.max_num_batched_tokens, num_sequences) if speculation else 0
        make_runner(1, 0, num_tokens + 1).try_largest(num_tokens, num_sequences, min(most, num_tokens - 1))

    num_blocks = settings.num_blocks or comm.smallest(
        device.kv_cache_bytes(settings, try_steps) // shared_bytes
    )
    max_len = _max_model_len(settings, config, num_blocks)
    num_host_blocks = comm.smallest(device.host_cache_bytes(settings) // host_bytes)
    if num_host_blocks and not settings.enable_prefix_caching:
        raise SettingsError(
            "swap_space_gb keeps blocks by their content, which needs enable_prefix_caching; use 0 without it"
        )
    runner = make_runner(num_blocks, num_host_blocks, max_len)
    runner.warm_up(min(settings.max_num_batched_tokens, max_len - 1))
    if device.records:
        device.run(runner.record_decode, settings.max_num_seqs)
    return Rank(runner, max_len, num_blocks, num_host_blocks)


def _make_engine(settings: Settings, model: Model, rank: Rank, runner: StepRunner) -> Engine:
    device, config, vocabulary = rank.runner.device, model.config, model.vocabulary
    settings = settings.sized_for(device.torch_device.type)
    limits = ModelLimits(
        vocabulary, config.vocab_size, config.end_ids, rank.max_len, settings.max_output_tokens
    )
    guides = GrammarCompiler(vocabulary, config.vocab_size, config.end_ids)
    scheduler = Scheduler(
        settings,
        limits,
        BlockManager(
            rank.num_blocks,
            settings.block_size,
            settings.enable_prefix_caching,
            HostBlocks(rank.num_host_blocks) if rank.num_host_blocks else None,
        ),
        guides,
        adapters=_adapter_folder(settings, model, _dtypes(settings, device)[0]),
        speculation=_speculation(settings, device),
    )
    info = EngineInfo(
        model=str(model.path),
        vocab_size=config.vocab_size,
        max_model_len=rank.max_len,
        max_num_seqs=settings.max_num_seqs,
        pad_id=config.pad_id,
        device=device.torch_device.type,
        num_blocks=rank.num_blocks,
        block_size=settings.block_size,
        allows_logits=settings.allow_logits,
    )
    # What is loaded now stays: no collection needs to look at it again.
    gc.collect()
    gc.freeze()
    return Engine(info, scheduler, runner, device.overlaps, settings.check_integrity)


def _speculation(settings: Settings, device: Device) -> Speculation | None:
    if not settings.num_speculative_tokens:
        return None
    return Speculation(settings.num_speculative_tokens, settings.prompt_lookup_min, device.num_free_tokens)


def _adapter_folder(settings: Settings, model: Model, dtype: torch.dtype) -> AdapterFolder | None:
    """Where requests' adapters are."""
    folder = _lora_folder(settings)
    if folder is None:
        return None

    def read(each: Path) -> dict[str, np.ndarray]:
        return read_adapter(each, model.family, model.config, dtype, settings.max_lora_rank)

    return AdapterFolder(folder, adapter_version, read, settings.max_loras)


def _lora_folder(settings: Settings) -> Path | None:
    """Raises SettingsError."""
    folder = Path(settings.lora_dir).expanduser() if settings.lora_dir else None
    if folder is not None and not folder.is_dir():
        raise SettingsError(f"lora_dir is {settings.lora_dir!r}, which is no folder")
    return folder


def _read_checkpoint(
    settings: Settings,
    model: Path,
    dtype: torch.dtype,
    device: Device,
    family: Family,
    config: DecoderConfig,
) -> Tensors:
    """The tensors that the decoder is made of."""
    place, quantizes = device.torch_device, settings.quantization != "none"
    if settings.load_format == "dummy":
        tensors: Tensors = RandomTensors(family, config, dtype, place)
        is_quantized = False
    else:
        has_codes = quantizes and settings.quantization != "fp8"
        codes = find_codes(settings.model, model, settings.cache_path) if has_codes else None
        tensors = checkpoint = Checkpoint(model, dtype, place, codes)
        is_quantized = checkpoint.is_quantized
    if settings.quantization == "fp8":
        return Fp8AtLoad(tensors)
    if quantizes:
        bits, activation_bits = settings.quantization.removeprefix("w").split("a")
        return QuantizedAtLoad(tensors, int(bits), int(activation_bits), rounds_head=True)
    if is_quantized and place.type == "cpu" and settings.ops == "auto":
        # One kernel has all layers: what the checkpoint has left dense becomes finer than what it has not.
        return QuantizedAtLoad(tensors, 8, None, rounds_head=False)
    return tensors


def _dtypes(settings: Settings, device: Device) -> tuple[torch.dtype, torch.dtype]:
    """Of the model and of its KV cache. Raises SettingsError for what the device has no kernels for."""
    is_cpu = device.torch_device.type == "cpu"
    if settings.quantization == "fp8" and not _takes_fp8(settings, device):
        raise SettingsError(
            "quantization is fp8, which needs the kernels of a GPU of compute capability 8.9 or more; use "
            "w8a16, which all have"
        )
    if settings.kv_cache_dtype == "fp8" and not _takes_fp8(settings, device):
        raise SettingsError(
            "kv_cache_dtype is fp8, which needs the kernels of a GPU of compute capability 8.9 or more; use "
            "auto, or int8 on a CPU"
        )
    if settings.kv_cache_dtype == "int8" and not (is_cpu and settings.ops == "auto"):
        raise SettingsError(
            "kv_cache_dtype is int8, which only the CPU's kernels have; use auto, or fp8 on a GPU that has it"
        )
    if settings.dtype == "float16" and is_cpu and settings.ops != "triton":
        raise SettingsError("dtype is float16, which needs a GPU; on a CPU use bfloat16 or float32")
    dtype = torch.bfloat16 if settings.dtype == "auto" else getattr(torch, settings.dtype)
    return dtype, {"auto": dtype, "int8": torch.uint8, "fp8": torch.float8_e4m3fn}[settings.kv_cache_dtype]


def _takes_fp8(settings: Settings, device: Device) -> bool:
    """Whether the operations that will be chosen do: plain torch's always, and a GPU's kernels on some."""
    if settings.ops == "reference":
        return True
    if settings.ops == "auto" and device.torch_device.type == "cpu":
        return False
    from pagetide.ops.gpu.device import multiplies_fp8  # imports the Triton language

    return multiplies_fp8(device.torch_device)


def _longest(settings: Settings, config: DecoderConfig) -> int:
    """The longest sequence that is asked for, or that the model takes."""
    asked = settings.max_model_len
    if asked > config.max_position:
        raise SettingsError(f"max_model_len is {asked}, the model's context is {config.max_position} tokens")
    return asked or config.max_position


def _max_model_len(settings: Settings, config: DecoderConfig, num_blocks: int) -> int:
    """The longest sequence: what is asked for, or what the model and the cache hold."""
    capacity = num_blocks * settings.block_size
    asked = settings.max_model_len
    if asked > capacity:
        raise SettingsError(
            f"max_model_len is {asked}, but {num_blocks} KV cache blocks hold {capacity} tokens; "
            "raise num_blocks or kv_cache_gb"
        )
    if capacity < 2:
        raise SettingsError(f"num_blocks is {num_blocks}: the KV cache must hold at least 2 tokens")
    return asked or min(config.max_position, capacity)
