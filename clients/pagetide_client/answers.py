"""What comes back."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import tritonclient.grpc as grpc
from tritonclient.grpc import service_pb2 as pb

from pagetide_client.errors import error_of_text


@dataclass(frozen=True)
class Chunk:
    """New text of one answer. finish_reason: empty until the answer has ended."""

    text: str
    token_ids: list[int]
    index: int  # which answer, if several were asked for
    finish_reason: str
    num_prompt_tokens: int
    num_cached_tokens: int  # of the prompt, found in the cache
    logprobs: dict[str, Any] | None = None  # of the new tokens, if asked for


@dataclass
class Answer:
    """One whole answer."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    logprobs: list[dict[str, Any]] = field(default_factory=list)  # of each chunk that had some


@dataclass
class Completion:
    """All answers to one prompt."""

    answers: list[Answer]
    num_prompt_tokens: int
    num_cached_tokens: int

    @property
    def text(self) -> str:
        """Of the first answer."""
        return self.answers[0].text

    @property
    def finish_reason(self) -> str:
        """Of the first answer: stop, length, cancelled, ..."""
        return self.answers[0].finish_reason

    @property
    def num_completion_tokens(self) -> int:
        """Of all answers together."""
        return sum(len(answer.token_ids) for answer in self.answers)


def chunk_of(response: pb.ModelStreamInferResponse) -> Chunk:
    """One response of the model. Raises the PagetideError that it may be."""
    if response.error_message:
        raise error_of_text(response.error_message)
    result = grpc.InferResult(response.infer_response)

    def number(name: str) -> int:
        return int(result.as_numpy(name).item())

    logprobs = result.as_numpy("logprobs")
    return Chunk(
        text=result.as_numpy("text_output").item().decode(),
        token_ids=result.as_numpy("output_ids").reshape(-1)[: number("sequence_length")].tolist(),
        index=number("sequence_index"),
        finish_reason=result.as_numpy("finish_reason").item().decode(),
        num_prompt_tokens=number("num_input_tokens"),
        num_cached_tokens=number("num_cached_tokens"),
        logprobs=None if logprobs is None else json.loads(logprobs.item()),
    )


def is_last(response: pb.ModelStreamInferResponse) -> bool:
    """Whether the request has no further responses."""
    return response.infer_response.parameters["triton_final_response"].bool_param


def joined(chunks: Iterable[Chunk]) -> Completion:
    """The whole answers that these chunks are pieces of."""
    answers: dict[int, Answer] = {}
    last: Chunk | None = None
    for last in chunks:
        answer = answers.setdefault(last.index, Answer())
        answer.text += last.text
        answer.token_ids += last.token_ids
        answer.finish_reason = last.finish_reason or answer.finish_reason
        if last.logprobs is not None:
            answer.logprobs.append(last.logprobs)
    assert last is not None, "a request has at least one response"
    return Completion([answers[i] for i in sorted(answers)], last.num_prompt_tokens, last.num_cached_tokens)
