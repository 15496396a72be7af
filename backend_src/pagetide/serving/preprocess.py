"""The model `preprocessing`: texts and chats to token ids and ONE tensor of checked parameters."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
import numpy as np
import triton_python_backend_utils as pb_utils

from pagetide.config import settings_beside
from pagetide.models.families import read_model
from pagetide.models.source import find_model
from pagetide.serving import triton
from pagetide.serving.contract import Defaults, ParsedRequest, parse, timed
from pagetide.serving.defaults import read_defaults
from pagetide.text.chat import ChatRenderer, ChatTemplateError, read_template
from pagetide.text.tokens import Vocabulary, decode
from pagetide.types import RequestError

# TensorRT-LLM's names of what this model takes; its clients chain the steps by hand.
TENSOR_OF_FIELD = {"text_input": "QUERY", "max_tokens": "REQUEST_OUTPUT_LEN"}
_FIELD_OF_TENSOR = {tensor: field for field, tensor in TENSOR_OF_FIELD.items()}
# Prompts of the face vllm_model come under a name of their own, by which its defaults are chosen.
VLLM_PROMPT = "VLLM_QUERY"
_VLLM_MAX_TOKENS = 16


Argument = TypeVar("Argument")
Result = TypeVar("Result")


class PreprocessModel:
    """Triton's Python model class."""

    def initialize(self, args: dict[str, str]) -> None:
        self._settings = settings_beside(args["model_repository"])
        self._model = find_model(self._settings.model, self._settings.cache_path)
        self._defaults = read_defaults(self._model, self._settings)
        params = msgspec.structs.replace(self._defaults.params, max_tokens=_VLLM_MAX_TOKENS)
        self._vllm_defaults = Defaults(params, is_greedy=False, excludes_input=False, flag_asks_for_logprobs=False)
        _, config = read_model(self._model)
        self._max_len = self._settings.max_model_len or config.max_position
        self._vocabulary = Vocabulary.read(self._model)
        self._max_bytes = self._max_len * max(map(len, self._vocabulary.full), default=1)
        template = read_template(self._settings.chat_template)
        from transformers import AutoTokenizer  # slow to import: after the settings have been found to be right

        self._tokenizer: Any = AutoTokenizer.from_pretrained(str(self._model))
        if template is not None:
            self._tokenizer.chat_template = template
        self._render_chat = ChatRenderer(self._tokenizer, self._max_bytes)

    def execute(self, requests: list[Any]) -> list[Any]:
        parsed = [_or_error(self._parse, request) for request in requests]
        prompts = [prompt for its in parsed if isinstance(its, list) for prompt in its]
        if isinstance(_or_error(self._tokenize, prompts), Exception):
            # Of all texts together one could not be tokenized: each by itself tells which.
            parsed = [its if isinstance(its, Exception) else _or_error(self._tokenize, its) for its in parsed]
        responses = [its if isinstance(its, Exception) else _or_error(self._respond, its) for its in parsed]
        return [triton.error_response(one) if isinstance(one, Exception) else one for one in responses]

    def _parse(self, request: Any) -> list[_Prompt]:
        now = time.monotonic_ns()
        arrays = {_FIELD_OF_TENSOR.get(name, name): array for name, array in triton.input_arrays(request).items()}
        defaults = self._defaults
        if VLLM_PROMPT in arrays:
            defaults = self._vllm_defaults
            arrays["text_input"] = arrays.pop(VLLM_PROMPT)
        parameters = triton.parameters(request)
        timeout_us = triton.timeout_us(request, parameters)
        return [self._check_size(self._render(timed(prompt, now, timeout_us))) for prompt in parse(arrays, parameters, defaults)]

    def _render(self, parsed: ParsedRequest) -> _Prompt:
        if parsed.messages is not None:
            try:
                text = self._render_chat(parsed.messages, parsed.tools, parsed.add_generation_prompt, parsed.chat_template_kwargs)
                return _Prompt(parsed, text, adds_special_tokens=False)
            except ChatTemplateError as error:
                raise RequestError(str(error)) from error
        if parsed.prompt_ids is not None and parsed.includes_input:
            shown = decode(self._vocabulary.table(parsed.params.skip_special_tokens), [i for i in parsed.prompt_ids if i >= 0])
            return _Prompt(parsed, None, shown=shown)
        return _Prompt(parsed, parsed.text)

    def _check_size(self, prompt: _Prompt) -> _Prompt:
        """Refuses what must have more tokens than the context: tokenizing 10 MB would keep all others waiting for half a minute."""
        if prompt.text is not None and len(prompt.text.encode()) > self._max_bytes:
            size = len(prompt.text)
            raise RequestError(f"the prompt has {size} characters, which are more tokens than the model's context has ({self._max_len})")
        return prompt

    def _tokenize(self, prompts: list[_Prompt]) -> list[_Prompt]:
        """Gives all prompts their token ids, in one call for texts and one for chats (whose templates write special tokens themselves)."""
        for adds_special_tokens in (True, False):
            texts = [p for p in prompts if p.text is not None and p.adds_special_tokens == adds_special_tokens]
            if texts:
                encoded = self._tokenizer([p.text for p in texts], add_special_tokens=adds_special_tokens).input_ids
                for prompt, ids in zip(texts, encoded, strict=True):
                    prompt.ids = ids
        return prompts

    def _respond(self, prompts: list[_Prompt]) -> Any:
        longest = max(1, *(len(prompt.ids) for prompt in prompts))
        ids = np.zeros((len(prompts), longest), np.int32)
        for row, prompt in zip(ids, prompts, strict=True):
            row[: len(prompt.ids)] = prompt.ids
        return pb_utils.InferenceResponse(
            [
                triton.tensor("INPUT_ID", ids),
                triton.tensor("REQUEST_INPUT_LEN", np.array([[len(prompt.ids)] for prompt in prompts], np.int32)),
                triton.tensor("PARAMS", triton.text_array([prompt.packed() for prompt in prompts]).reshape(-1, 1)),
            ]
        )


def _or_error(function: Callable[[Argument], Result], argument: Argument) -> Result | Exception:
    """An error belongs to one request; the others of its batch do not notice."""
    try:
        return function(argument)
    except Exception as error:
        return error


class _Prompt:
    """A prompt on its way from text to ids."""

    def __init__(self, parsed: ParsedRequest, text: str | None, adds_special_tokens: bool = True, shown: str | None = None):
        self.parsed = parsed
        self.text = text
        self.shown = text if shown is None else shown
        self.adds_special_tokens = adds_special_tokens
        self.ids: list[int] = parsed.prompt_ids or []

    def packed(self) -> bytes:
        """What `llm` needs to know beside the ids, as MessagePack."""
        rest = msgspec.structs.replace(
            self.parsed,
            text=None,
            messages=None,
            prompt_ids=None,
            tools=None,
            chat_template_kwargs={},
            prompt_text=self.shown if self.parsed.includes_input else None,
        )
        return msgspec.msgpack.encode(rest)
