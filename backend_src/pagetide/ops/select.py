"""Which set of functions a device uses. Asked once, at load."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from pagetide.config import Settings, SettingsError
from pagetide.ops.comm import ALONE, Comm
from pagetide.ops.plain import REFERENCE
from pagetide.ops.table import Ops


def select_ops(
    device: torch.device,
    settings: Settings,
    dtype: torch.dtype,
    model: Path,
    folder: Path | None = None,
    comm: Comm = ALONE,
) -> Ops:
    """The fastest set that this device has; the reference set if the settings say so. Raises SettingsError.

    folder: where the model's weights of this type may be kept as the device takes them; comm: whose part they
    are.
    """
    if settings.ops == "triton" and device.type == "cpu" and not os.environ.get("TRITON_INTERPRET"):
        raise SettingsError("ops is triton, which a CPU can only interpret: set TRITON_INTERPRET=1 for that")
    if settings.ops == "triton" or (device.type == "cuda" and settings.ops == "auto"):
        from pagetide.ops.gpu.choices import measured_choices  # imports the Triton language
        from pagetide.ops.gpu.libraries import chunk_attention
        from pagetide.ops.gpu.table import make_gpu_ops

        make_chunks = chunk_attention(settings, device, dtype)
        return make_gpu_ops(dtype, measured_choices(settings.cache_path, device), make_chunks)
    if settings.attention_backend != "auto":
        raise SettingsError(
            f"attention_backend is {settings.attention_backend}, which needs the kernels of a GPU; on a CPU, "
            "and with ops reference, leave it at auto"
        )
    if device.type == "cpu" and settings.ops == "auto":
        from pagetide.ops.cpu.kept import keeper  # imports Numba, which a GPU does not need
        from pagetide.ops.cpu.table import make_cpu_ops

        form = str(dtype).removeprefix("torch.")
        if settings.quantization != "none":
            form += f"_{settings.quantization}"
        if comm.size > 1:
            form += f"_{comm.rank}of{comm.size}"
        return make_cpu_ops(keeper(model, folder, form))
    return REFERENCE
