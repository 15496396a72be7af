"""What crosses the borders between layers and processes: requests in, outputs out. All frozen.

These are msgspec structs, so that the same objects are passed in memory (offline) and as MessagePack (engine process).
"""

from __future__ import annotations

import msgspec


class RequestError(ValueError):
    """What a client asked for cannot be done; the message says what was wrong and what is allowed."""


class QueueFullError(RuntimeError):
    """The engine holds as many requests as it may; the client should try again later."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the tokens of one prompt are chosen, and when to stop. Names and defaults are vLLM's.

    n: number of independent samples of the prompt.
    temperature: 0 is greedy; 1 samples from the model's own distribution.
    top_k: keep the k most likely tokens; 0 and -1 keep all.
    top_p: keep the smallest set of tokens whose probabilities add up to top_p.
    min_p: keep tokens at least min_p times as likely as the most likely one.
    seed: the same seed and prompt give the same tokens in any company; None draws one.
    max_tokens: at most so many new tokens; None: the rest of the context, as far as the settings allow.
    min_tokens: end-of-sequence tokens and stop texts do not count before so many new tokens.
    stop: texts that end the answer; they are cut off.
    ignore_eos: go on after an end-of-sequence token.
    end_id: the end-of-sequence token; None: the model's own, -1: none.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: str | tuple[str, ...] = ()
    ignore_eos: bool = False
    end_id: int | None = None

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """The stop texts as a tuple, empty ones left out."""
        texts = (self.stop,) if isinstance(self.stop, str) else self.stop
        return tuple(text for text in texts if text)


class Request(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One prompt on its way through the engine.

    number: unique among all clients of an engine; request_id: the client's own name, not necessarily unique.
    stream: outputs as tokens come; otherwise one output per sequence, at its end.
    """

    number: int
    prompt_ids: list[int]
    params: SamplingParams
    request_id: str = ""
    stream: bool = False


class Output(msgspec.Struct, frozen=True, array_like=True):
    """New tokens of one sequence.

    index: which of the request's samples. ids: the new token ids.
    num_cut: bytes at the end of the tokens' text that do not belong to the answer (a stop text, and what came after it).
    finish_reason: empty, or in the last output of a sequence `stop`, `length` or `cancelled`.
    """

    number: int
    index: int
    ids: list[int]
    num_cut: int = 0
    finish_reason: str = ""
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0


class EngineInfo(msgspec.Struct, frozen=True):
    """What clients of an engine need to know of it. model: the model directory. device: cpu or cuda."""

    model: str
    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    pad_id: int
    device: str
