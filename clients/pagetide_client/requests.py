"""What is sent: a prompt, and request fields by name."""

from __future__ import annotations

import json
import math
import random
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tritonclient.grpc import service_pb2 as pb

from pagetide_client.errors import InvalidRequestError

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
_LONGEST_S = 2_000_000.0  # that timeout_ms can say
CHANNEL = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1))


@dataclass(frozen=True)
class Retries:
    """How often a request that has had no response yet is sent again, if the server is busy or not there.

    Waits twice as long each time, and a random part more, so that clients do not come back together.
    """

    count: int = 2
    first_wait: float = 0.5  # seconds

    def pause(self, attempt: int, left: float | None) -> float | None:
        """Seconds before attempt number `attempt` (from 1) is repeated; None: it is not, since that was often
        enough, or would be after the `left` seconds that remain (None: no limit).
        """
        wait = self.first_wait * 2 ** (attempt - 1) * (1 + random.random())
        return None if attempt > self.count or (left is not None and wait > left) else wait


def completion_request(
    model: str, prompt: Prompt, stream: bool, fields: dict[str, Any], limit: float | None
) -> pb.ModelInferRequest:
    """Of a prompt as it is. limit: seconds after which nobody waits for the answer."""
    request = _request(model, stream, fields, limit)
    if isinstance(prompt, str):
        _add_text(request, "text_input", prompt)
    else:
        _add(request, "input_ids", "INT32", [1, len(prompt)], np.array(prompt, np.int32).tobytes())
    return request


def chat_request(
    model: str, messages: Messages, stream: bool, fields: dict[str, Any], limit: float | None
) -> pb.ModelInferRequest:
    """Of a conversation, for the model's chat template."""
    request = _request(model, stream, fields, limit)
    _add_text(request, "messages", json.dumps(list(messages)))
    return request


def _request(model: str, stream: bool, fields: dict[str, Any], limit: float | None) -> pb.ModelInferRequest:
    given = {name: value for name, value in fields.items() if value is not None}
    if limit is not None and limit < _LONGEST_S:
        # A request that says nothing until its end is not told by Triton that its client has gone.
        given.setdefault("timeout_ms", max(1, math.ceil(1000 * limit)))
    counts = {"return_num_input_tokens": True, "return_num_cached_tokens": True}
    request = pb.ModelInferRequest(model_name=model)
    for name in (*OUTPUTS, "logprobs") if {"logprobs", "prompt_logprobs"} & given.keys() else OUTPUTS:
        request.outputs.add(name=name)
    _add(request, "stream", "BOOL", [1, 1], bytes([stream]))
    _add_text(request, "sampling_parameters", json.dumps(given | counts))
    return request


def _add_text(request: pb.ModelInferRequest, name: str, value: str) -> None:
    try:
        data = value.encode()
    except UnicodeEncodeError:
        raise InvalidRequestError(f"{name} has half of a surrogate pair, which is no character") from None
    _add(request, name, "BYTES", [1, 1], struct.pack("<I", len(data)) + data)


def _add(request: pb.ModelInferRequest, name: str, kind: str, shape: list[int], data: bytes) -> None:
    request.inputs.add(name=name, datatype=kind, shape=shape)
    request.raw_input_contents.append(data)
