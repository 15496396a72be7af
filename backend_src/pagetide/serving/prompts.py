"""From a checked request to a prompt's token ids: renders chats, tokenizes texts. Knows nothing of Triton."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from pagetide.config import Settings
from pagetide.contract.parsed import ParsedRequest
from pagetide.models.families import read_model
from pagetide.text.chat import ChatRenderer, ChatTemplateError, read_template
from pagetide.text.tokens import Vocabulary, decode
from pagetide.types import RequestError


class PromptText:
    """A prompt on its way from text to ids.

    text: None if the client has sent ids. shown: what stands in front of the answer, if the client wants
    that.
    adds_special_tokens: False for chats, whose templates write them.
    """

    def __init__(
        self,
        parsed: ParsedRequest,
        text: str | None,
        adds_special_tokens: bool = True,
        shown: str | None = None,
    ):
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


class PromptReader:
    """The tokenizer and chat template of a model directory.

    Raises OSError if settings name a template that is not there.
    """

    def __init__(self, model: Path, settings: Settings):
        _, config = read_model(model)
        self._max_len = settings.max_model_len or config.max_position
        self._vocabulary = Vocabulary.read(model)
        self._max_bytes = self._max_len * max(map(len, self._vocabulary.full), default=1)
        template = read_template(settings.chat_template)
        # Slow to import: after the settings have been found to be right. AutoTokenizer would import torch
        # too.
        from transformers import PreTrainedTokenizerFast

        self._tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(str(model))
        if template is not None:
            self._tokenizer.chat_template = template
        self._chats = ChatRenderer(self._tokenizer, self._max_bytes)

    def read(self, parsed: ParsedRequest) -> PromptText:
        """The prompt's text, rendered if it is a chat. Raises RequestError."""
        return self._check_size(self._render(parsed))

    def _render(self, parsed: ParsedRequest) -> PromptText:
        if parsed.messages is not None:
            messages, tools, variables = parsed.messages, parsed.tools, parsed.chat_template_kwargs
            try:
                if parsed.continue_final_message:
                    text = self._chats.continued(messages, tools, variables)
                else:
                    text = self._chats.render(messages, tools, parsed.add_generation_prompt, variables)
            except ChatTemplateError as error:
                raise RequestError(str(error)) from error
            return PromptText(parsed, text, adds_special_tokens=False)
        if parsed.prompt_ids is not None and parsed.includes_input:
            table = self._vocabulary.table(parsed.params.skip_special_tokens)
            return PromptText(parsed, None, shown=decode(table, [i for i in parsed.prompt_ids if i >= 0]))
        return PromptText(parsed, parsed.text)

    def _check_size(self, prompt: PromptText) -> PromptText:
        """Refuses what must have more tokens than the context.

        Tokenizing 10 MB would keep all others waiting for half a minute.
        """
        if prompt.text is not None and len(prompt.text.encode()) > self._max_bytes:
            raise RequestError(
                f"the prompt has {len(prompt.text)} characters, which are more tokens than the "
                f"model's context has ({self._max_len})"
            )
        return prompt

    def tokenize(self, prompts: list[PromptText]) -> None:
        """Gives all prompts their token ids, in one call for texts and one for chats."""
        for adds_special_tokens in (True, False):
            some = [p for p in prompts if p.text is not None and p.adds_special_tokens == adds_special_tokens]
            if some:
                texts = [prompt.text for prompt in some]
                encoded = self._tokenizer(texts, add_special_tokens=adds_special_tokens).input_ids
                for prompt, ids in zip(some, encoded, strict=True):
                    prompt.ids = ids
