"""Writes LoRA adapters with random weights for a model, to measure and to try with: as PEFT would, of one
rank for all matrices of attention and MLP.

python scripts/random_adapter.py FOLDER [--model X] [--rank 16]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "backend_src"))

import torch
from pagetide.models.adapters import module_sizes
from pagetide.models.families import read_model
from pagetide.models.source import find_model
from safetensors.torch import save_file

CACHE = Path(__file__).resolve().parents[1] / ".cache"


def write(folder: Path, model: str, rank: int, seed: int = 0) -> None:
    """An adapter that changes a little of what the model says."""
    family, config = read_model(find_model(model, CACHE))
    noise = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (outputs, inputs) in module_sizes(family, config).items():
        prefix = f"base_model.model.{name}"
        tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, inputs, generator=noise) * inputs**-0.5
        tensors[f"{prefix}.lora_B.weight"] = torch.randn(outputs, rank, generator=noise) * 0.02
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": rank})
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="", help="as the setting of this name")
    parser.add_argument("--rank", type=int, default=16)
    arguments = parser.parse_args()
    write(arguments.folder, arguments.model, arguments.rank)


if __name__ == "__main__":
    main()
