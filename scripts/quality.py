"""What quantization costs in quality and brings in speed: each setting against full precision, on a fixed
text (scripts/quality.txt) and fixed chats.

perplexity      of the text, under each setting
divergence      mean Kullback-Leibler divergence of the next token's distribution, full precision against it
same token      share of the text's positions where the likeliest token is the same
same answer     share of 64 greedy tokens, in chats, until the first that differs
tokens/s        of one sequence (128 in, 128 out) and of 32 (the benchmark's `single` and `batch`)

Each setting runs in a process of its own.

python scripts/quality.py [--model DIR] [--settings w8a16 w4a16+kv-int8] [--json FILE] [--plot FILE]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "backend_src"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
from engines import CACHE, QUANTIZATIONS, run_pagetide
from limits import versions
from pagetide.llm import LLM
from pagetide.types import Request, SamplingParams
from tqdm import tqdm
from workloads import workload

TEXT = Path(__file__).with_suffix(".txt")
WINDOW = 256  # tokens of the text that are looked at together
QUESTIONS = (
    "Why is the sky blue?",
    "Write a short poem about the sea.",
    "How do I sort a list of numbers in Python?",
    "Give me three tips for a good night's sleep.",
    "What is the difference between a virus and a bacterium?",
    "Explain photosynthesis to a child.",
    "Name five animals that live in the desert.",
    "Translate 'good morning, my friend' into French.",
)


def context_logprobs(llm: LLM, ids: list[int]) -> np.ndarray:
    """float32 [tokens, vocabulary]: what the engine says of each next token. llm: with allow_logits."""
    params = SamplingParams(temperature=0, max_tokens=1)
    llm.engine.add(Request(number=0, prompt_ids=ids, params=params, context_logits=True))
    found = b""
    while llm.engine.has_work:
        for output in llm.engine.step().outputs:
            found += output.context_logits
    logits = np.frombuffer(found, np.float32).reshape(len(ids), -1).astype(np.float64)
    logits -= logits.max(1, keepdims=True)
    return (logits - np.log(np.exp(logits).sum(1, keepdims=True))).astype(np.float32)


def divergence(full: np.ndarray, own: np.ndarray) -> np.ndarray:
    """[positions]: Kullback-Leibler divergence of log-probabilities [positions, vocabulary], in nats."""
    return (np.exp(full) * (full - own)).sum(1)


def settings_of(name: str) -> dict[str, str]:
    """Of a row: a quantization, a KV cache dtype, or both (`w4a8+kv-int8`); with a slash, the directory of a
    checkpoint that has been quantized already, served as it is.
    """
    if "/" in name:
        return {"model": name}
    settings = {}
    for part in name.split("+"):
        is_cache = part.startswith("kv-")
        settings["kv_cache_dtype" if is_cache else "quantization"] = part.removeprefix("kv-")
    return settings


def run_one(setting: str, model: str, target: Path) -> None:
    """In a process of its own: what is looked at of one setting, into an .npz file."""
    chosen = settings_of(setting)
    model = chosen.pop("model", model)
    llm = LLM(model, cache_dir=CACHE, allow_logits=True, num_blocks=300, **chosen)
    tokenizer = llm.get_tokenizer()
    ids = tokenizer(TEXT.read_text(encoding="utf-8")).input_ids
    windows = [ids[at : at + WINDOW] for at in range(0, len(ids), WINDOW)]
    logprobs = np.concatenate([context_logprobs(llm, window)[:-1] for window in windows])
    following = np.concatenate([window[1:] for window in windows])
    chats = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        for question in QUESTIONS
    ]
    answers = llm.generate(chats, SamplingParams(temperature=0, max_tokens=64))
    llm.close()
    del llm
    runs: dict[str, list[float]] = {}
    for name, figures in run_pagetide(workload, ["single", "batch"] * 3, model, **chosen):
        runs.setdefault(name, []).append(figures.tokens_per_s)
    rates = {name: np.median(values) for name, values in runs.items()}
    padded = [(answer.outputs[0].token_ids + [-1] * 64)[:64] for answer in answers]
    np.savez(target, logprobs=logprobs, following=following, answers=padded, **rates)


def compare(full: Any, own: Any) -> dict[str, float]:
    """One setting's row, from what run_one has written."""
    chosen = own["logprobs"][np.arange(len(own["following"])), own["following"]]
    differs = full["answers"] != own["answers"]
    same = np.where(differs.any(1), differs.argmax(1), differs.shape[1])
    return {
        "perplexity": float(np.exp(-chosen.mean(dtype=np.float64))),
        "divergence": float(divergence(full["logprobs"], own["logprobs"]).mean()),
        "same_token": float((full["logprobs"].argmax(1) == own["logprobs"].argmax(1)).mean()),
        "same_answer": float(same.mean() / differs.shape[1]),
        "single": float(own["single"]),
        "batch": float(own["batch"]),
    }


def measure(settings: list[str], model: str) -> dict[str, dict[str, float]]:
    """Rows by setting; full precision, `none`, comes first and is what the others are compared with."""
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for setting in tqdm(["none", *(each for each in settings if each != "none")], unit="setting"):
            command = [sys.executable, __file__, "--run-one", setting, "--model", model]
            target = f"{folder}/{len(found)}.npz"
            subprocess.run([*command, "--target", target], check=True)
            with np.load(f"{folder}/0.npz") as full, np.load(target) as own:
                found[setting] = compare(full, own)
    return found


def table(rows: dict[str, dict[str, float]]) -> str:
    full = rows["none"]
    lines = [
        "| setting | perplexity | divergence | same token | same answer | single | batch |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in rows.items():
        speeds = " | ".join(f"{row[key]:.0f} ({row[key] / full[key]:.2f}x)" for key in ("single", "batch"))
        lines.append(
            f"| {name} | {row['perplexity']:.2f} | {row['divergence']:.4f} | {row['same_token']:.1%} | "
            f"{row['same_answer']:.0%} | {speeds} |"
        )
    return "\n".join(lines)


def draw(rows: dict[str, dict[str, float]], file: Path) -> None:
    """Speed against divergence."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for key, marker in (("single", "o"), ("batch", "s")):
        speeds = [row[key] / rows["none"][key] for row in rows.values()]
        axes.plot(speeds, [row["divergence"] for row in rows.values()], marker, label=key)
        for name, speed, row in zip(rows, speeds, rows.values(), strict=True):
            axes.annotate(
                name, (speed, row["divergence"]), textcoords="offset points", xytext=(6, 4), fontsize=9
            )
    axes.set_xlabel("tokens/s, as a multiple of full precision's")
    axes.set_ylabel("divergence from full precision (nats a token)")
    axes.set_title("Quantization: speed against quality")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, dpi=130)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="", help="a model directory; the embedded model if not given")
    parser.add_argument(
        "--settings",
        nargs="+",
        default=["kv-int8", *QUANTIZATIONS, "w4a8+kv-int8"],
        help="values of `quantization`, kv-int8 for that `kv_cache_dtype`, or both with a +; or directories "
        "that scripts/quantize.py has made of the model",
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--plot", type=Path, help="draw a plot into this file")
    parser.add_argument("--run-one", help=argparse.SUPPRESS)
    parser.add_argument("--target", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run_one:
        run_one(arguments.run_one, arguments.model, arguments.target)
        return 0
    rows = measure(arguments.settings, arguments.model)
    print(table(rows))
    summary = {"machine": versions(), "quality": rows}
    if arguments.json:
        arguments.json.write_text(json.dumps(summary, indent=1))
    if arguments.plot:
        draw(rows, arguments.plot)
    print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
