"""Writes a model directory with random weights in the shape of Llama-3.2-1B and the embedded model's
tokenizer, filled up: 1.2 billion parameters in bfloat16, 2.5 GB, to measure what a larger model costs.

python scripts/random_model.py FOLDER
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "backend_src"))

import torch
from pagetide.models.source import find_model
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[1]


def write(folder: Path) -> None:
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=128_256,
        max_position_embeddings=8192,
        rope_theta=500_000.0,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder)
    for file in find_model("", ROOT / ".cache").glob("*token*"):
        shutil.copy(file, folder)
    fill(folder / "tokenizer.json", config.vocab_size)


def fill(file: Path, size: int) -> None:
    """Adds tokens that no text has, so that all of the model's rows count."""
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    known = set(vocabulary.values()) | {token["id"] for token in tokenizer["added_tokens"]}
    vocabulary |= {f"<filler {i}>": i for i in range(size) if i not in known}
    file.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    write(Path(sys.argv[1]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
