"""What is sent: a prompt, and request fields by name."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tritonclient.grpc as grpc

Messages = Sequence[dict[str, Any]]
Prompt = str | Sequence[int]  # text, or token ids

OUTPUTS = (
    "text_output",
    "output_ids",
    "sequence_length",
    "sequence_index",
    "finish_reason",
    "num_input_tokens",
    "num_cached_tokens",
)


@dataclass(frozen=True)
class Retries:
    """How often a request that has had no response yet is sent again, if the server is busy or not there.

    Waits twice as long each time, and a random part more, so that clients do not come back together.
    """

    count: int = 2
    first_wait: float = 0.5  # seconds

    def wait(self, attempt: int) -> float:
        """Before attempt number `attempt` (from 1) is repeated."""
        return self.first_wait * 2 ** (attempt - 1) * (1 + random.random())


def completion_inputs(prompt: Prompt, stream: bool, fields: dict[str, Any]) -> list[grpc.InferInput]:
    """Of a prompt as it is."""
    if isinstance(prompt, str):
        return [_text("text_input", prompt), *_common(stream, fields)]
    ids = grpc.InferInput("input_ids", [1, len(prompt)], "INT32")
    ids.set_data_from_numpy(np.array([prompt], np.int32))
    return [ids, *_common(stream, fields)]


def chat_inputs(messages: Messages, stream: bool, fields: dict[str, Any]) -> list[grpc.InferInput]:
    """Of a conversation, for the model's chat template."""
    return [_text("messages", json.dumps(list(messages))), *_common(stream, fields)]


def outputs_for(fields: dict[str, Any]) -> list[grpc.InferRequestedOutput]:
    """Only what chunks are made of."""
    names = [*OUTPUTS, "logprobs"] if fields.get("logprobs") is not None else OUTPUTS
    return [grpc.InferRequestedOutput(name) for name in names]


def _common(stream: bool, fields: dict[str, Any]) -> list[grpc.InferInput]:
    given = {name: value for name, value in fields.items() if value is not None}
    counts = {"return_num_input_tokens": True, "return_num_cached_tokens": True}
    streams = grpc.InferInput("stream", [1, 1], "BOOL")
    streams.set_data_from_numpy(np.array([[stream]]))
    return [streams, _text("sampling_parameters", json.dumps(given | counts))]


def _text(name: str, value: str) -> grpc.InferInput:
    result = grpc.InferInput(name, [1, 1], "BYTES")
    result.set_data_from_numpy(np.array([[value.encode()]], np.object_))
    return result
