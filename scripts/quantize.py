"""Writes a model with matrices of 4 or 8 bits, as a compressed-tensors checkpoint, which vLLM and
transformers know as well: each input's weights are rounded in turn, and those that follow make up for the
error, as far as a sample of text shows what they are multiplied with (GPTQ, arXiv:2210.17323).

The sample is a text file, or else what the model itself says after random first tokens (as in LLM-QAT,
arXiv:2305.17888).

python scripts/quantize.py FOLDER [--model M] [--bits 4] [--group 128] [--text FILE | --nearest]
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "backend_src"))

import numpy as np
import torch
from compressed_tensors.compressors import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from huggingface_hub import save_torch_state_dict
from pagetide.folders import make_once
from pagetide.llm import LLM
from pagetide.models.source import find_model
from pagetide.types import SamplingParams
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

CACHE = Path(__file__).resolve().parents[1] / ".cache"
SAMPLES, LENGTH = 128, 256  # sequences, and tokens of each
SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8)  # what a group's largest weight may be cut to
DAMPING = 0.01  # of the mean of what inputs' squares are, added to all
BLOCK = 128  # inputs whose errors are handed on together
GROUPS = (32, 64, 128)  # inputs of a scale, of which other engines have kernels
COPIED = (".json", ".jinja", ".txt", ".model")  # how names of a tokenizer's and a configuration's files end


class Codes:
    """How weights are rounded: symmetric, a scale of bfloat16 for each group of inputs."""

    def __init__(self, bits: int, group: int):
        self.bits, self.group = bits, group
        self._low, self._high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1

    def scales(self, weights: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
        """[out] of weights [out, group]: those that make the squares of the errors smallest, each input's
        counted as often as `importance` [group] says.
        """
        largest = weights.abs().amax(1) / (-self._low - 0.5)
        best = error = None
        for shrink in SHRINKS:
            found = (largest * shrink).bfloat16().float()
            found = torch.where(found > 0, found, 1.0)
            off = (self.codes(weights, found) * found[:, None] - weights).square() @ importance
            if best is None or error is None:
                best, error = found, off
            best, error = torch.where(off < error, found, best), torch.minimum(off, error)
        assert best is not None
        return best

    def codes(self, weights: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """The nearest, as numbers; weights [out, n], scales [out]."""
        return (weights / scales[:, None]).round().clamp(self._low, self._high)

    def round(self, weights: torch.Tensor, squares: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes int8 [out, in] and scales [out, in / group] of a matrix. squares [in, in]: the mean of the
        products of what it is multiplied with; a diagonal matrix rounds to the nearest.
        """
        weights, importance = weights.clone(), squares.diagonal().clone()
        squares = squares + DAMPING * importance.mean() * torch.eye(len(squares))
        factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(squares)), upper=True)
        codes, scales = torch.empty(weights.shape, dtype=torch.int8), []
        for first in range(0, weights.shape[1], BLOCK):
            block = range(first, min(first + BLOCK, weights.shape[1]))
            errors = torch.zeros(len(weights), len(block))
            for at in block:
                if at % self.group == 0:
                    group = slice(at, at + self.group)
                    scales.append(self.scales(weights[:, group], importance[group]))
                column = weights[:, at]
                found = self.codes(column[:, None], scales[-1])[:, 0]
                codes[:, at] = found.to(torch.int8)
                error = (column - found * scales[-1]) / factor[at, at]
                weights[:, at : block.stop] -= torch.outer(error, factor[at, at : block.stop])
                errors[:, at - first] = error
            weights[:, block.stop :] -= errors @ factor[first : block.stop, block.stop :]
        return codes, torch.stack(scales, 1)


class Inputs(NamedTuple):
    """Of one sequence: what the next layer is called with, and what each is called with by name; layers of
    different kinds have different angles and masks.
    """

    args: tuple[Any, ...]
    kwargs: list[dict[str, Any]]


def own_words(model: Path, count: int, length: int) -> list[list[int]]:
    """What the model says after random first tokens: `count` sequences of tokens."""
    llm = LLM(str(model), cache_dir=str(CACHE))
    chooser = np.random.default_rng(0)
    firsts = chooser.integers(0, llm.engine.info.vocab_size, count).tolist()
    params = [SamplingParams(seed=seed, max_tokens=length - 1, ignore_eos=True) for seed in range(count)]
    results = llm.generate([[first] for first in firsts], params)
    llm.close()
    return [[first, *one.outputs[0].token_ids] for first, one in zip(firsts, results, strict=True)]


def tokens_of(text: Path, model: Path, count: int, length: int) -> list[list[int]]:
    """The first of a text's tokens, cut into sequences. Raises SystemExit where there is none."""
    read = text.read_text(encoding="utf-8")
    if not read.strip():
        raise SystemExit(f"{text} is empty: give a text of some pages, like what the model will read")
    ids = AutoTokenizer.from_pretrained(model)(read)["input_ids"]
    return [ids[at : at + length] for at in range(0, len(ids), length)][:count]


def first_inputs(model: Any, sample: list[list[int]]) -> list[Inputs]:
    """What the layers are called with for each sequence."""
    found: list[Inputs] = []

    def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module is model.model.layers[0]:
            found.append(Inputs(args, []))
        found[-1].kwargs.append(kwargs)

    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in model.model.layers]
    for ids in sample:
        model.model(torch.tensor([ids]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def squares_of(layer: Any, number: int, calls: list[Inputs]) -> dict[str, torch.Tensor]:
    """Of each of the layer's matrices, by name: the mean of the products of its inputs [in, in]."""
    sums: dict[str, torch.Tensor] = {}
    hooks = []
    for name, module in matrices_of(layer):

        def note(module: Any, args: tuple[torch.Tensor, ...], name: str = name) -> None:
            x = args[0].flatten(0, -2).float()
            sums[name] = sums.get(name, 0) + x.T @ x

        hooks.append(module.register_forward_pre_hook(note))
    num_tokens = 0
    for args, kwargs in calls:
        layer(*args, **kwargs[number])
        num_tokens += args[0].shape[1]
    for hook in hooks:
        hook.remove()
    return {name: total / num_tokens for name, total in sums.items()}


def matrices_of(layer: Any) -> Iterator[tuple[str, torch.nn.Linear]]:
    return ((name, one) for name, one in layer.named_modules() if isinstance(one, torch.nn.Linear))


@torch.inference_mode()
def quantized_tensors(model: Any, codes: Codes, sample: list[list[int]] | None) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors, with its layers' matrices as codes. sample: None: each weight is rounded to
    the nearest.
    """
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    calls = first_inputs(model, sample) if sample else []
    for number, layer in enumerate(tqdm(model.model.layers, desc="layers", disable=None)):
        squares = squares_of(layer, number, calls) if sample else {}
        for name, module in matrices_of(layer):
            whole = module.weight.float()
            found, scales = codes.round(whole, squares.get(name, torch.eye(whole.shape[1])))
            prefix = f"model.layers.{number}.{name}"
            del tensors[f"{prefix}.weight"]
            tensors[f"{prefix}.weight_packed"] = pack_to_int32(found, codes.bits)
            tensors[f"{prefix}.weight_scale"] = scales.bfloat16()
            tensors[f"{prefix}.weight_shape"] = torch.tensor(found.shape)
            module.weight.data = (
                (found.unflatten(1, (-1, codes.group)) * scales[..., None]).flatten(1).to(module.weight.dtype)
            )
        calls = [
            Inputs((hidden_of(layer(*args, **kwargs[number])), *args[1:]), kwargs) for args, kwargs in calls
        ]
    return tensors


def hidden_of(result: Any) -> torch.Tensor:
    return result[0] if isinstance(result, tuple) else result


def settings_of(codes: Codes) -> dict[str, Any]:
    """What config.json says of them."""
    weights = QuantizationArgs(num_bits=codes.bits, symmetric=True, strategy="group", group_size=codes.group)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    found = QuantizationConfig(
        config_groups={"group_0": scheme},
        format="pack-quantized",
        quantization_status="compressed",
        ignore=["lm_head"],
    )
    return dict(found.model_dump(mode="json", exclude_none=True))


def write(folder: Path, model: Path, codes: Codes, sample: list[list[int]] | None) -> None:
    """The model's directory with other weights."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
    tensors = quantized_tensors(loaded, codes, sample)
    for file in model.iterdir():
        if file.is_file() and file.name.endswith(COPIED) and not file.name.endswith(".index.json"):
            shutil.copy(file, folder)
    save_torch_state_dict(tensors, str(folder), shared_tensors_to_discard=[])
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config |= {"quantization_config": settings_of(codes), "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def check(model: Path, codes: Codes) -> None:
    """Raises SystemExit for a model whose matrices have no such groups, or that is quantized already."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    if "quantization_config" in config:
        raise SystemExit(f"{model} is quantized already; give the checkpoint that it was made of")
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    inputs = (hidden, heads * (config.get("head_dim") or hidden // heads), config["intermediate_size"])
    possible = [group for group in GROUPS if not any(size % group for size in inputs)]
    if codes.group not in possible:
        raise SystemExit(
            f"the matrices have {', '.join(map(str, sorted(set(inputs))))} inputs, which are no whole groups "
            f"of {codes.group}; possible: {', '.join(map(str, possible)) or 'none'}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="that is made")
    parser.add_argument("--model", default="", help="as the setting of this name")
    parser.add_argument("--bits", type=int, choices=(4, 8), default=4)
    parser.add_argument("--group", type=int, choices=GROUPS, default=128, help="inputs of a scale")
    parser.add_argument("--samples", type=int, default=SAMPLES, help=f"sequences of {LENGTH} tokens")
    parser.add_argument("--text", type=Path, help="the sample; without: what the model itself says")
    parser.add_argument("--nearest", action="store_true", help="no sample: round to the nearest")
    options = parser.parse_args()
    if options.folder.exists():
        parser.error(f"{options.folder} exists already")
    model, codes = find_model(options.model, CACHE), Codes(options.bits, options.group)
    check(model, codes)
    sample = None
    if not options.nearest:
        size = (options.samples, LENGTH)
        sample = tokens_of(options.text, model, *size) if options.text else own_words(model, *size)
    make_once(options.folder.resolve(), lambda folder: write(folder, model, codes, sample))
    print(f"{options.folder}: serve it with --model {options.folder}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
