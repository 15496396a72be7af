"""The model `preprocessing`: texts and chats to token ids and ONE tensor of checked parameters."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
import numpy as np
import triton_python_backend_utils as pb_utils

from pagetide.contract.faces import PREPROCESSING_NAMES, VLLM_PROMPT
from pagetide.contract.parse import parse
from pagetide.contract.parsed import Defaults, timed
from pagetide.models.source import find_model
from pagetide.serving import triton
from pagetide.serving.defaults import read_defaults
from pagetide.serving.prompts import PromptReader, PromptText
from pagetide.serving.siblings import Siblings

_FIELD_OF_TENSOR = {tensor: field for field, tensor in PREPROCESSING_NAMES.items()}
_VLLM_MAX_TOKENS = 16

Argument = TypeVar("Argument")
Result = TypeVar("Result")


class PreprocessModel:
    """Triton's Python model class."""

    def initialize(self, args: dict[str, str]) -> None:
        settings = triton.settings_of(args)
        model = find_model(settings.model, settings.cache_path)
        self._defaults = read_defaults(model, settings)
        params = msgspec.structs.replace(self._defaults.params, max_tokens=_VLLM_MAX_TOKENS)
        self._vllm_defaults = Defaults(
            params, is_greedy=False, excludes_input=False, flag_asks_for_logprobs=False
        )
        self._reader = PromptReader(model, settings)
        self._siblings = Siblings(args["model_instance_name"], triton.server_pid())
        self._siblings.join()

    def execute(self, requests: list[Any]) -> list[Any]:
        parsed = [_or_error(self._read, request) for request in requests]
        prompts = [prompt for its in parsed if isinstance(its, list) for prompt in its]
        if isinstance(_or_error(self._tokenize, prompts), Exception):
            # Of all texts together one could not be tokenized: each by itself tells which.
            parsed = [its if isinstance(its, Exception) else _or_error(self._tokenize, its) for its in parsed]
        responses = [its if isinstance(its, Exception) else _or_error(self._respond, its) for its in parsed]
        return [triton.error_response(one) if isinstance(one, Exception) else one for one in responses]

    def _read(self, request: Any) -> list[PromptText]:
        now = time.monotonic_ns()
        given = triton.input_arrays(request)
        arrays = {_FIELD_OF_TENSOR.get(name, name): array for name, array in given.items()}
        defaults = self._defaults
        if VLLM_PROMPT in arrays:
            defaults = self._vllm_defaults
            arrays["text_input"] = arrays.pop(VLLM_PROMPT)
        parameters = triton.parameters(request)
        timeout_us = triton.timeout_us(request, parameters)
        prompts = parse(arrays, parameters, defaults)
        return [self._reader.read(timed(prompt, now, timeout_us)) for prompt in prompts]

    def _tokenize(self, prompts: list[PromptText]) -> list[PromptText]:
        self._reader.tokenize(prompts)
        return prompts

    def _respond(self, prompts: list[PromptText]) -> Any:
        longest = max(1, *(len(prompt.ids) for prompt in prompts))
        ids = np.zeros((len(prompts), longest), np.int32)
        for row, prompt in zip(ids, prompts, strict=True):
            row[: len(prompt.ids)] = prompt.ids
        lengths = np.array([[len(prompt.ids)] for prompt in prompts], np.int32)
        packed = triton.text_array([prompt.packed() for prompt in prompts]).reshape(-1, 1)
        tensors = {"INPUT_ID": ids, "REQUEST_INPUT_LEN": lengths, "PARAMS": packed}
        return pb_utils.InferenceResponse([triton.tensor(*one) for one in tensors.items()])

    def finalize(self) -> None:
        self._siblings.leave()


def _or_error(function: Callable[[Argument], Result], argument: Argument) -> Result | Exception:
    """An error belongs to one request; the others of its batch do not notice."""
    try:
        return function(argument)
    except Exception as error:
        return error
