"""Pagetide: an LLM engine for NVIDIA Triton Inference Server. LLM and SamplingParams are loaded when they are first used."""

from typing import Any

__all__ = ["LLM", "SamplingParams"]


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from pagetide.llm import LLM

        return LLM
    if name == "SamplingParams":
        from pagetide.types import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'pagetide' has no attribute {name!r}")
