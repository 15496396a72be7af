"""The engine on a device that shows every wrong block (context_runner.py), driven by hand."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np
from context_runner import VOCABULARY, ContextRunner
from pagetide.config import make_settings
from pagetide.engine.adapters import Adapter
from pagetide.engine.blocks import BlockManager
from pagetide.engine.drafts import Speculation
from pagetide.engine.engine import Engine
from pagetide.engine.groups import ModelLimits
from pagetide.engine.guides import GuideState
from pagetide.engine.host_blocks import HostBlocks
from pagetide.engine.requests import Refusal
from pagetide.engine.scheduler import Scheduler
from pagetide.runner.plan import bits_of
from pagetide.text.tokens import Vocabulary
from pagetide.types import EngineInfo, Guide, Output, Request, SamplingParams

END_ID = 7


class ManualGuides:
    """Grammars that are ready when a test says so; the only rule is that tokens are below a limit."""

    def __init__(self) -> None:
        self.futures: dict[str, Future[Callable[[], GuideState]]] = {}

    def compile(self, guide: Guide) -> Future[Callable[[], GuideState]]:
        return self.futures.setdefault(guide.text, Future())

    def finish(self, text: str, tokens: list[int]) -> None:
        self.futures[text].set_result(lambda: FixedAnswer(tokens))


class ManualAdapters:
    """Adapters whose names are numbers, and which say so; those that a test holds back come later."""

    def __init__(self) -> None:
        self.futures: dict[str, Future[Adapter]] = {}
        self.has_room = True

    def start(self, name: str) -> Future[Adapter] | None:
        if not self.has_room:
            return None
        if name not in self.futures:
            self.futures[name] = Future()
            self.futures[name].set_result(Adapter(name, {"number": np.array(int(name))}))
        return self.futures[name]


class FixedAnswer:
    """A grammar with one sentence."""

    def __init__(self, tokens: list[int]):
        self.left = list(tokens)

    def fill(self, mask: np.ndarray) -> None:
        mask[:] = bits_of([self.left[0] if self.left else END_ID], VOCABULARY)

    def advance(self, token: int) -> None:
        assert token == self.left.pop(0)


class SmallEngine:
    """The engine's decisions on a ContextRunner, with an integrity check after every step."""

    def __init__(
        self,
        num_blocks: int = 64,
        block_size: int = 4,
        max_model_len: int = 64,
        overlaps: bool = True,
        num_host_blocks: int = 0,
        **settings: Any,
    ):
        values = {
            "max_num_seqs": 4,
            "max_num_batched_tokens": 16,
            "num_blocks": num_blocks,
            "block_size": block_size,
            **settings,
        }
        self.settings = make_settings(**values)
        table = [bytes([ord("a") + i % 26]) for i in range(VOCABULARY)]
        limits = ModelLimits(Vocabulary(table, table), VOCABULARY, frozenset([END_ID]), max_model_len, 32)
        self.guides = ManualGuides()
        self.clock_ns = 0
        host = HostBlocks(num_host_blocks) if num_host_blocks else None
        self.blocks = BlockManager(num_blocks, block_size, self.settings.enable_prefix_caching, host)
        self.adapters = ManualAdapters()
        longest, num_alike = self.settings.num_speculative_tokens, self.settings.prompt_lookup_min
        speculation = Speculation(longest, num_alike, num_free=24) if longest else None
        self.scheduler = Scheduler(
            self.settings, limits, self.blocks, self.guides, lambda: self.clock_ns, self.adapters, speculation
        )
        self.runner = ContextRunner(
            self.settings.max_num_seqs,
            max_model_len,
            num_blocks,
            block_size,
            self.settings.max_num_batched_tokens,
            num_host_blocks,
        )
        info = EngineInfo(
            "", VOCABULARY, max_model_len, self.settings.max_num_seqs, 0, "cpu", num_blocks, block_size, False
        )
        self.engine = Engine(info, self.scheduler, self.runner, overlaps, check_integrity=True)
        self.outputs: list[Output] = []
        self.refusals: list[Refusal] = []

    def add(self, number: int, prompt: list[int], **params: Any) -> None:
        values = {"ignore_eos": True, "seed": 0, **params}
        fields = {*Request.__struct_fields__} - {"number", "prompt_ids", "params", "request_id"}
        own = {name: values.pop(name) for name in fields & values.keys()}
        self.engine.add(
            Request(
                number=number,
                prompt_ids=prompt,
                params=SamplingParams(**values),
                request_id=f"r{number}",
                **own,
            )
        )

    def step(self) -> None:
        outputs, refusals = self.engine.step()
        self.outputs += outputs
        self.refusals += refusals

    def run(self, max_steps: int = 5000) -> None:
        for _ in range(max_steps):
            if not self.engine.has_work:
                return
            self.step()
        raise AssertionError(f"not done after {max_steps} steps")

    def run_until(self, condition: Callable[[], bool], max_steps: int = 5000) -> None:
        for _ in range(max_steps):
            if condition():
                return
            self.step()
        raise AssertionError(f"not true after {max_steps} steps")

    def tokens(self, number: int, index: int = 0) -> list[int]:
        return [t for o in self.outputs if o.number == number and o.index == index for t in o.ids]

    def reason(self, number: int, index: int = 0) -> list[str]:
        return [
            o.finish_reason
            for o in self.outputs
            if o.number == number and o.index == index and o.finish_reason
        ]
