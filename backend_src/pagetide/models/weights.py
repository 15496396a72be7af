"""Reads a checkpoint's tensors by name, from safetensors files, sharded or not."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open

from pagetide.models.config import UnsupportedModelError


class Checkpoint:
    """The tensors of a Hugging Face model directory, read from disk when they are asked for.

    Every tensor comes in the given dtype, on the given device.
    """

    def __init__(self, model: Path, dtype: torch.dtype, device: torch.device):
        self._dtype = dtype
        self._device = device
        files = sorted(model.glob("*.safetensors"))
        if not files:
            raise UnsupportedModelError(f"{model} has no .safetensors files")
        self._file_of = {}
        for file in files:
            opened = safe_open(str(file), framework="pt")
            for name in opened.keys():  # noqa: SIM118 (safe_open is no dict)
                self._file_of[name] = opened

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def read(self, name: str) -> torch.Tensor:
        if name not in self:
            raise UnsupportedModelError(f"the checkpoint has no tensor called {name}")
        return self._file_of[name].get_tensor(name).to(self._device, self._dtype)

    def read_merged(self, names: tuple[str, ...], part: str) -> torch.Tensor | None:
        """The tensors `name.part` of all names, stacked along the output dimension; None if the checkpoint has none of them."""
        if f"{names[0]}.{part}" not in self:
            return None
        return torch.cat([self.read(f"{name}.{part}") for name in names])
