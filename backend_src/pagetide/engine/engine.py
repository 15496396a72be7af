"""The engine: requests in, outputs out, one step at a time."""

from __future__ import annotations

from dataclasses import asdict
from typing import NamedTuple, Protocol

import numpy as np

from pagetide.engine.requests import Refusal
from pagetide.engine.scheduler import Scheduler
from pagetide.engine.statistics import Statistics
from pagetide.runner.plan import StepPlan, StepTokens
from pagetide.types import EngineError, EngineInfo, Output, Request


class StepRunner(Protocol):
    """The engine's view of a device, or of several."""

    def forward(self, plan: StepPlan) -> None:
        """Queues the model's work behind that of the step before, and returns at once."""

    def sample(self, plan: StepPlan, masks: np.ndarray | None = None) -> None:
        """Queues the sampling of the plan's tokens, and their way to the host.

        masks: of plan.guided_rows, int32 [g, vocabulary / 32].
        """

    def wait(self, plan: StepPlan) -> StepTokens:
        """Waits for the tokens of a step; raises what the step raised."""

    def close(self) -> None:
        """Waits for all that is queued."""


class StepResult(NamedTuple):
    """What became known in a step. refusals: requests of which nothing more comes."""

    outputs: list[Output]
    refusals: list[Refusal]


class Engine:
    """Scheduler and runner of one model. Nothing in it is thread-safe.

    overlaps: the device computes beside the host, which does its work for step k-1 while step k runs:
    schedule() knows the tokens of the last step by count only, all older ones exactly. Where host and device
    share the processor nothing is gained by that, and a step is planned when the one before has ended: a
    request that comes while a step runs is in the next, and tokens are known as soon as they are there.
    """

    def __init__(
        self,
        info: EngineInfo,
        scheduler: Scheduler,
        runner: StepRunner,
        overlaps: bool = True,
        check_integrity: bool = False,
    ):
        self.info = info
        self.scheduler = scheduler
        self.runner = runner
        # What is guessed next depends on all tokens before.
        self._overlaps = overlaps and not scheduler.guesses
        self._check_integrity = check_integrity
        self._last: StepPlan | None = None
        self._has_failed = False

    @property
    def has_failed(self) -> bool:
        """True if a step raised an error or was interrupted: step() then raises EngineError."""
        return self._has_failed

    @property
    def has_room(self) -> bool:
        """True if add() does not raise QueueFullError."""
        return self.scheduler.requests.has_room

    @property
    def has_work(self) -> bool:
        """True if step() has something to run, to wait for or to tell."""
        return self._last is not None or self.scheduler.has_work

    def add(self, request: Request) -> None:
        """Queues a request that check_request has accepted.

        Raises QueueFullError, RequestError, EngineError.
        """
        self.scheduler.add(request)

    def cancel(self, numbers: list[int], request_id: str = "") -> None:
        """Ends requests by number, and all that their clients call request_id if it is not empty.

        Their answers end with what they have; numbers that are not known have ended already.
        """
        named = self.scheduler.requests.numbers_of(request_id) if request_id else []
        self.scheduler.cancel([*numbers, *named])

    def step(self) -> StepResult:
        """One step of all requests; waits shortly if all that is to do is on its way.

        Raises what the device raised; from then on EngineError.
        """
        if self._has_failed:
            raise EngineError("the engine failed in an earlier step, whose error says why; start another")
        try:
            return self._step()
        except BaseException:
            self._has_failed = True
            raise

    def _step(self) -> StepResult:
        plan = self.scheduler.schedule()
        if plan is None and self._last is None:
            self.scheduler.requests.wait_for_needs()
        if plan is not None:
            self.runner.forward(plan)
            if not self._waits_for_masks(plan):
                self._sample(plan)
        if self._last is not None:
            self.scheduler.commit(self._last, self.runner.wait(self._last))
        if plan is not None and self._waits_for_masks(plan):
            self._sample(plan)
        self._last = plan
        if plan is not None and not self._overlaps:
            self.scheduler.commit(plan, self.runner.wait(plan))
            self._last = None
        if self._check_integrity:
            self.scheduler.check_integrity()
        return StepResult(self.scheduler.outputs.take(), self.scheduler.requests.take_refusals())

    def _waits_for_masks(self, plan: StepPlan) -> bool:
        """Guides know all tokens before this step's only when the last step has ended.

        The device is busy with this one meanwhile.
        """
        return self._last is not None and len(plan.guided_rows) > 0

    def _sample(self, plan: StepPlan) -> None:
        self.runner.sample(plan, self.scheduler.masks(plan) if len(plan.guided_rows) else None)

    def statistics(self) -> Statistics:
        """What the engine holds and has counted, and the observations since the last call."""
        scheduler = self.scheduler
        gauges = {
            "running": len(scheduler.running),
            "waiting": scheduler.num_waiting,
            "blocks_total": scheduler.blocks.num_blocks,
            "blocks_used": scheduler.blocks.num_used,
            "blocks_cached": scheduler.blocks.num_cached,
        }
        return Statistics(gauges, asdict(scheduler.counters), scheduler.observed.take())

    def close(self) -> None:
        """Waits for the device; the engine cannot be used afterwards."""
        self.runner.close()
