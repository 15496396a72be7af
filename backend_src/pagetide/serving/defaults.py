"""What holds where a request says nothing: the model's generation_config.json and the settings."""

from __future__ import annotations

import json
from pathlib import Path

from pagetide.config import Settings
from pagetide.contract.checks import check_params
from pagetide.contract.parsed import Defaults
from pagetide.types import RequestError, SamplingParams

# SamplingParams' name by the file's.
_NAMES = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


def read_defaults(model: Path, settings: Settings) -> Defaults:
    """Raises ValueError if the model's file has values that no request could have."""
    params = _model_params(model) if settings.generation_config == "model" else SamplingParams()
    return Defaults(params, settings.default_sampling == "trtllm", settings.exclude_input_in_output)


def _model_params(model: Path) -> SamplingParams:
    file = model / "generation_config.json"
    raw = json.loads(file.read_bytes()) if file.exists() else {}
    values = {ours: raw[theirs] for theirs, ours in _NAMES.items() if raw.get(theirs) is not None}
    if raw.get("do_sample") is False:
        values["temperature"] = 0.0  # what transformers' generate does with such a file
    params = SamplingParams(**values)
    try:
        check_params(params)
    except RequestError as error:
        raise ValueError(f"{file}: {error}; the setting generation_config=none ignores this file") from None
    return params
