"""Pagetide: an LLM engine for NVIDIA Triton Inference Server.

LLM and SamplingParams are loaded when they are first used.
"""

import contextlib
import ctypes
from typing import Any

__all__ = ["LLM", "SamplingParams"]

# torch brings an OpenMP runtime of its own, Numba takes the system's: two pools of threads that spin
# against each other on the same cores. Where the system's is loaded first, torch takes it too. Where there
# is none, or torch was imported before, both work, but slower together.
with contextlib.suppress(OSError):
    ctypes.CDLL("libgomp.so.1.0.0")


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from pagetide.llm import LLM

        return LLM
    if name == "SamplingParams":
        from pagetide.types import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'pagetide' has no attribute {name!r}")
