"""Reads a checkpoint's tensors by name, from safetensors files, sharded or not."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open

from pagetide.models.config import UnsupportedModelError, read_json
from pagetide.ops.weights import DenseWeight, Weight


def _files(model: Path) -> list[Path]:
    """The checkpoint's files: those of its index, if it has one, since others may be left over from another
    checkpoint.
    """
    index = model / "model.safetensors.index.json"
    if index.exists():
        files = [model / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    else:
        files = (
            [model / "model.safetensors"]
            if (model / "model.safetensors").exists()
            else sorted(model.glob("*.safetensors"))
        )
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise UnsupportedModelError(
            f"{model} lacks {', '.join(missing)}, which model.safetensors.index.json names"
        )
    if not files:
        raise UnsupportedModelError(f"{model} has no .safetensors files")
    return files


class Checkpoint:
    """The tensors of a Hugging Face model directory, read from disk when they are asked for.

    Every tensor comes in the given dtype, on the given device.
    """

    def __init__(self, model: Path, dtype: torch.dtype, device: torch.device):
        self._dtype = dtype
        self._device = device
        self._file_of = {}
        for file in _files(model):
            opened = safe_open(str(file), framework="pt")
            for name in opened.keys():  # noqa: SIM118 (safe_open is no dict)
                self._file_of[name] = opened

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the device and in the type of the engine. Raises UnsupportedModelError."""
        if name not in self:
            raise UnsupportedModelError(f"the checkpoint has no tensor called {name}")
        return self._file_of[name].get_tensor(name).to(self._device, self._dtype)

    def read_weight(self, names: tuple[str, ...]) -> Weight:
        """The matrices of these modules as one, with the outputs of all."""
        return DenseWeight.stacked([DenseWeight(self.read(f"{name}.weight")) for name in names])

    def read_bias(self, names: tuple[str, ...]) -> torch.Tensor | None:
        """Their biases as one; None if the checkpoint has none of them."""
        if f"{names[0]}.bias" not in self:
            return None
        return torch.cat([self.read(f"{name}.bias") for name in names])
