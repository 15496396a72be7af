"""The models that Triton serves, and how each writes calls and thoughts, told by its own chat template."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pagetide.gateway.bodies import ChatBody
from pagetide.gateway.calls import Thinking
from pagetide.gateway.errors import ApiError, refused
from pagetide.gateway.triton import Triton

log = logging.getLogger("pagetide.gateway")

_KEPT_S = 10.0
_ADAPTER_CONFIG = "adapter_config.json"
_MOST_NAMED = 20
_MOST_HABITS = 256  # models with variables of their templates
_MOST_TOLD = 4096  # characters of such variables; what more would say of the habits is not asked
_CALL = {
    "id": "abcdefghi",  # Mistral's templates take ids of nine characters only
    "type": "function",
    "function": {"name": "probe", "arguments": "{}"},
}
_USER = {"role": "user", "content": "question"}

Variables = dict[str, Any] | None


@dataclass(frozen=True)
class Habits:
    """calls: the format of tool calls, one of calls.FORMATS. thinks: thoughts stand before answers.

    begins_thinking: the prompt of an answer itself opens them.
    """

    calls: str = "hermes"
    thinks: bool = False
    begins_thinking: bool = False

    def thinking(self, body: ChatBody) -> Thinking | None:
        """A new one for each answer to this chat, unless that has no thoughts."""
        if not self.thinks:
            return None
        if body.continue_final_message:
            begun = str(body.messages[-1].get("content"))
            return Thinking(True) if begun.rfind("<think>") > begun.rfind("</think>") else None
        return Thinking(self.begins_thinking and body.add_generation_prompt is not False)


@dataclass
class _Known:
    """Habits, and until when they are taken to be so. asking: for what they are by now."""

    habits: Habits | None = None
    until: float = 0.0
    asking: asyncio.Future[None] | None = None


@dataclass(frozen=True)
class Chosen:
    """What a request's `model` means. triton: the model's name there; lora_name: the adapter's, empty: none;
    shown: as the answer names it.
    """

    triton: str
    lora_name: str
    shown: str


class Models:
    """Asks Triton, and remembers the answer for some seconds. call_format: overrides the template's.

    lora_dir: the folder of adapters whose names are models too where Triton has one model.
    """

    def __init__(self, triton: Triton, call_format: str = "", lora_dir: Path | None = None):
        self._triton = triton
        self._call_format = call_format
        self._lora_dir = lora_dir
        self._names: list[str] = []
        self._habits: OrderedDict[tuple[str, str], _Known] = OrderedDict()
        self._known_until = 0.0
        self._asking: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._asking.set_result(None)

    async def names(self) -> list[str]:
        if self._is_old:
            await self._ask_for_names()
        return self._names

    def adapters(self) -> list[str]:
        """Those that are models by their own name."""
        if self._lora_dir is None or len(self._names) != 1:
            return []
        try:
            names = sorted(file.parent.name for file in self._lora_dir.glob(f"*/{_ADAPTER_CONFIG}"))
        except OSError as error:
            log.warning("adapters cannot be listed: %s", error)
            return []
        return [name for name in names if name.isprintable()]

    async def choose(self, name: str | None) -> Chosen:
        """A model, or one with an adapter: `model:adapter`, or the adapter's name alone. Raises ApiError."""
        if name is not None and name not in self._names and (found := self._with_adapter(name)):
            self._refresh()
            return found
        try:
            model = await self.find(name)
            return Chosen(model, "", model)
        except ApiError:
            if name is not None and (found := self._with_adapter(name)):
                return found
            raise

    def _with_adapter(self, name: str) -> Chosen | None:
        base, _, adapter = name.partition(":")
        if base in self._names and adapter:
            return Chosen(base, adapter, name)
        if self._lora_dir is None or len(self._names) != 1 or "/" in name or "\0" in name:
            return None
        try:
            has_one = (self._lora_dir / name / _ADAPTER_CONFIG).is_file()
        except (OSError, ValueError):  # no file can have such a name
            return None
        return Chosen(self._names[0], name, name) if has_one else None

    def _refresh(self) -> None:
        """Asks for the models again, if they are old, while a request goes on."""
        if self._is_old and self._asking.done():
            self._asking = asyncio.ensure_future(self._ask_again())

    async def find(self, name: str | None) -> str:
        """The Triton model of this name; without a name, the only one. Raises ApiError.

        A model that was there lately is taken to be there: no request waits for the list but one for a model
        that it does not have.
        """
        if name in self._names or (name is None and len(self._names) == 1):
            self._refresh()
            return name or self._names[0]
        names = await self.names()
        if not names:
            raise ApiError(503, "Triton serves no model yet")
        if name in names:
            return name
        if name is None and len(names) == 1:
            return names[0]
        if name is None:
            raise refused(f"model must be named; there are {', '.join(names)}", "model")
        known = [*names, *self.adapters()]
        shown = ", ".join(known[:_MOST_NAMED]) + (", ..." if len(known) > _MOST_NAMED else "")
        message = f"there is no model {name!r}; there are {shown}"
        raise ApiError(404, message, "model", "model_not_found")

    @property
    def _is_old(self) -> bool:
        return time.monotonic() > self._known_until

    async def _ask_for_names(self) -> None:
        self._names = await self._triton.models()
        self._known_until = time.monotonic() + _KEPT_S

    async def _ask_again(self) -> None:
        try:
            await self._ask_for_names()
        except ApiError as error:  # the request itself will say so too
            log.warning("the list of models is the last one known: %s", error)

    async def habits(self, name: str, variables: Variables = None) -> Habits:
        """Of a model whose template is given these variables (chat_template_kwargs). What was true lately is
        taken to be true, and asked for again while the request goes on. Raises ApiError.
        """
        told = json.dumps(variables, sort_keys=True) if variables else ""
        if len(told) > _MOST_TOLD:
            variables, told = None, ""
        known = self._habits.setdefault((name, told), _Known())
        self._habits.move_to_end((name, told))
        while len(self._habits) > _MOST_HABITS:
            self._habits.popitem(last=False)
        if time.monotonic() > known.until and (known.asking is None or known.asking.done()):
            known.asking = asyncio.ensure_future(self._learn(known, name, variables))
            # Whoever has asked may have left.
            known.asking.add_done_callback(lambda done: done.cancelled() or done.exception())
        if known.habits is None and known.asking is not None:
            await asyncio.shield(known.asking)
        assert known.habits is not None
        return known.habits

    async def _learn(self, known: _Known, name: str, variables: Variables) -> None:
        try:
            known.habits = await self._ask(name, variables)
        except ApiError as error:  # the request itself will say so too
            if known.habits is None:
                raise
            log.warning("the habits of %s are the last ones known: %s", name, error)
        known.until = time.monotonic() + _KEPT_S

    async def _ask(self, model: str, variables: Variables) -> Habits:
        """Renders small chats: the marker of a call, and whether old thoughts are left out, tell."""
        calling = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
        called = await self._rendered(model, variables, [_USER, calling])
        calls = "hermes"
        if "[TOOL_CALLS]" in called:
            calls = "mistral"
        elif "<tool_call>" not in called and '"parameters"' in called:
            calls = "llama3"
        thought = {"role": "assistant", "content": "<think>\nthought\n</think>\n\nanswer"}
        shown = await self._rendered(model, variables, [_USER, thought, _USER])
        thinks = "answer" in shown and "thought" not in shown
        opening = await self._rendered(model, variables, [_USER], opens=True)
        opened = opening.rstrip().endswith("<think>")
        return Habits(self._call_format or calls, thinks or opened, opened)

    async def _rendered(
        self, model: str, variables: Variables, messages: list[Any], opens: bool = False
    ) -> str:
        """A chat as the template writes it; empty where it refuses such a one."""
        chat = {"messages": messages, "add_generation_prompt": opens}
        if variables is not None:
            chat["chat_template_kwargs"] = variables
        try:
            return await self._triton.detokenize(model, await self._triton.tokenize(model, chat))
        except ApiError as error:
            if error.status != 400:
                raise
            return ""
