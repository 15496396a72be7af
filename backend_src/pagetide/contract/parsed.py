"""A client's prompt once it has been parsed, and what holds where it says nothing."""

from __future__ import annotations

from typing import Any

import msgspec

from pagetide.types import SamplingParams

_NEVER_NS = 10 * 365 * 86_400 * 10**9  # ten years: whoever asks for more asks for no limit


class Defaults(msgspec.Struct, frozen=True):
    """What holds where a request says nothing: the model's own sampling, and the settings' rules.

    is_greedy: without top_k, top_p, min_p and seed a request is greedy (TensorRT-LLM's rule).
    flag_asks_for_logprobs: return_logprobs alone asks for the sampled tokens' (Triton's vLLM backend
    answers null then).
    """

    params: SamplingParams = SamplingParams()
    is_greedy: bool = False
    excludes_input: bool = True
    flag_asks_for_logprobs: bool = True


NO_DEFAULTS = Defaults()


class ParsedRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One prompt of a client's request, checked as far as it can be without the model.

    Exactly one of text, messages, prompt_ids is given, unless it is a cancel. This is also what
    `preprocessing` hands to `llm`, packed; prompt_text is then what stands in front of the answer. returns:
    the fields that ask for outputs and are true; shows_logprobs: `logprobs` is there too.
    """

    params: SamplingParams = SamplingParams()
    text: str | None = None
    messages: list[dict[str, Any]] | None = None
    prompt_ids: list[int] | None = None
    prompt_text: str | None = None
    tools: list[Any] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = {}
    stream: bool = False
    includes_input: bool = False
    cancel: bool = False
    pad_id: int | None = None
    priority: int = 0
    salt: str = ""
    lora_name: str = ""
    user: str = ""
    traceparent: str = ""
    timeout_ms: int = 0
    arrival_ns: int = 0
    deadline_ns: int = 0
    returns: tuple[str, ...] = ()
    shows_logprobs: bool = False


def timed(parsed: ParsedRequest, arrival_ns: int, timeout_us: int) -> ParsedRequest:
    """The request with its arrival and deadline on the monotonic clock.

    timeout_us: the request's own, beside timeout_ms; 0: none.
    """
    limits = [limit for limit in (parsed.timeout_ms * 10**6, timeout_us * 10**3) if 0 < limit < _NEVER_NS]
    return msgspec.structs.replace(
        parsed, arrival_ns=arrival_ns, deadline_ns=arrival_ns + min(limits) if limits else 0
    )
