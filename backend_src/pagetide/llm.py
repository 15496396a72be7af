"""The engine without a server: LLM(model).generate(prompts, SamplingParams(...)), with the names that
vLLM's users know.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from pagetide.config import make_settings
from pagetide.contract.checks import check_request
from pagetide.engine.assemble import assemble
from pagetide.text.tokens import Vocabulary, decode
from pagetide.types import Output, Request, SamplingParams, TokenScore

Prompt = str | Seq[int]


@dataclass
class CompletionOutput:
    """One answer to a prompt. finish_reason: `stop` or `length`.

    logprobs: one for each token, if asked for.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    cumulative_logprob: float | None = None
    logprobs: list[TokenScore] = field(default_factory=list)


@dataclass
class RequestOutput:
    """A prompt and its answers. num_cached_tokens: tokens of the prompt that the prefix cache held.

    prompt_logprobs: one for each token of the prompt but the first, if asked for.
    """

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    num_cached_tokens: int = 0
    prompt_logprobs: list[TokenScore] = field(default_factory=list)


class LLM:
    """A model with an engine in this process.

    model: as the setting of that name; every other setting can be given by name too, for example dtype,
    max_num_seqs, max_model_len.
    Raises SettingsError, UnsupportedModelError.
    """

    def __init__(self, model: str = "", **settings: Any):
        # Whoever calls generate() waits for all answers: its queue has no limit.
        self.engine = assemble(make_settings(model=model, **settings, max_queue_s=0.0))
        self._vocabulary = Vocabulary.read(Path(self.engine.info.model))
        self._tokenizer: Any = None
        self._num_requests = 0

    def get_tokenizer(self) -> Any:
        """The model's transformers tokenizer."""
        if self._tokenizer is None:
            from transformers import PreTrainedTokenizerFast  # slow to import; not needed for token ids

            self._tokenizer = PreTrainedTokenizerFast.from_pretrained(self.engine.info.model)
        return self._tokenizer

    def generate(
        self,
        prompts: Prompt | Seq[Prompt],
        sampling_params: SamplingParams | Seq[SamplingParams] | None = None,
        use_tqdm: bool = False,
        lora_name: str | Seq[str] = "",
    ) -> list[RequestOutput]:
        """Completes prompts (texts, or lists of token ids) all together; one result for each, in their order.

        sampling_params, lora_name: for all prompts, or one for each; lora_name: an adapter in the folder
        lora_dir, empty: none. Raises RequestError, before anything runs but for what turns out later: that
        a grammar or an adapter is none.
        """
        listed = _as_list(prompts)
        params = (
            list(sampling_params)
            if isinstance(sampling_params, Seq)
            else [sampling_params or SamplingParams()] * len(listed)
        )
        if len(params) != len(listed):
            raise ValueError(f"there are {len(listed)} prompts but {len(params)} sampling_params")
        names = [lora_name] * len(listed) if isinstance(lora_name, str) else list(lora_name)
        if len(names) != len(listed):
            raise ValueError(f"there are {len(listed)} prompts but {len(names)} lora_names")
        requests = [self._make_request(*each) for each in zip(listed, params, names, strict=True)]
        results = {
            request.number: RequestOutput(
                prompt if isinstance(prompt, str) else None,
                request.prompt_ids,
                [CompletionOutput(i) for i in range(request.params.n)],
            )
            for prompt, request in zip(listed, requests, strict=True)
        }
        self._run(requests, results, use_tqdm)
        return list(results.values())

    def _make_request(self, prompt: Prompt, params: SamplingParams, lora_name: str) -> Request:
        ids = (
            self.get_tokenizer()(prompt).input_ids
            if isinstance(prompt, str)
            else [int(token) for token in prompt]
        )
        self._num_requests += 1
        request = Request(number=self._num_requests, prompt_ids=ids, params=params, lora_name=lora_name)
        check_request(request, self.engine.info)
        return request

    def _run(self, requests: list[Request], results: dict[int, RequestOutput], use_tqdm: bool) -> None:
        engine, waiting = self.engine, deque(requests)
        skips = {request.number: request.params.skip_special_tokens for request in requests}
        with tqdm(
            total=sum(request.params.n for request in requests), disable=not use_tqdm, unit="sequence"
        ) as progress:
            try:
                while waiting or engine.has_work:
                    while waiting and engine.has_room:
                        engine.add(waiting.popleft())
                    outputs, refusals = engine.step()
                    for output in outputs:
                        table = self._vocabulary.table(skips[output.number])
                        _take(output, results[output.number], table)
                        progress.update(bool(output.finish_reason))
                    if refusals:
                        raise refusals[0].error
            except BaseException:
                self._drop(requests)
                raise

    def _drop(self, requests: list[Request]) -> None:
        """Leaves nothing of these requests behind, so that the next call finds an empty engine, unless that
        has failed.
        """
        self.engine.cancel([request.number for request in requests])
        while self.engine.has_work and not self.engine.has_failed:
            self.engine.step()

    def close(self) -> None:
        """Waits for the device; the engine cannot be used afterwards."""
        self.engine.close()


def _take(output: Output, result: RequestOutput, table: list[bytes]) -> None:
    answer = result.outputs[output.index]
    answer.token_ids.extend(output.ids)
    answer.text += decode(table, output.ids, output.num_cut)
    answer.finish_reason = output.finish_reason
    answer.logprobs.extend(output.scores)
    answer.cumulative_logprob = output.cumulative_logprob if answer.logprobs else None
    result.prompt_logprobs.extend(output.prompt_scores)
    result.num_cached_tokens = output.num_cached_tokens


def _as_list(prompts: Prompt | Seq[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]
