"""The overlapped step loop: the host's work for step k-1 is done while the device runs step k."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from pagetide.engine.scheduler import Scheduler
from pagetide.runner.plan import StepPlan, StepTokens
from pagetide.types import Output


class StepRunner(Protocol):
    """The engine's view of a device, or of several."""

    def forward(self, plan: StepPlan) -> None:
        """Queues the model's work behind that of the step before, and returns at once."""

    def sample(self, plan: StepPlan, masks: np.ndarray | None = None) -> None:
        """Queues the sampling of the plan's tokens, and their way to the host. masks: of plan.guided, int32 [g, vocabulary / 32]."""

    def wait(self, plan: StepPlan) -> StepTokens:
        """Waits for the tokens of a step; raises what the step raised."""


class EngineLoop:
    """Scheduler and runner.

    overlaps: the device computes beside the host, which does its work for step k-1 while step k runs: schedule() knows the tokens of the last
    step by count only, all older ones exactly. Where host and device share the processor nothing is gained by that, and a step is planned when
    the one before has ended: a request that comes while a step runs is in the next, and tokens are known as soon as they are there.
    """

    def __init__(self, scheduler: Scheduler, runner: StepRunner, overlaps: bool = True, check_integrity: bool = False):
        self.scheduler = scheduler
        self._runner = runner
        self._overlaps = overlaps
        self._check_integrity = check_integrity
        self._last: StepPlan | None = None

    @property
    def has_work(self) -> bool:
        return self._last is not None or self.scheduler.has_work

    def step(self) -> list[Output]:
        """One step; returns what became known in it."""
        plan = self.scheduler.schedule()
        if plan is None and self._last is None:
            self.scheduler.wait_for_guides()
        if plan is not None:
            self._runner.forward(plan)
            if not self._waits_for_masks(plan):
                self._sample(plan)
        if self._last is not None:
            self.scheduler.commit(self._last, self._runner.wait(self._last))
        if plan is not None and self._waits_for_masks(plan):
            self._sample(plan)
        self._last = plan
        if plan is not None and not self._overlaps:
            self.scheduler.commit(plan, self._runner.wait(plan))
            self._last = None
        if self._check_integrity:
            self.scheduler.check_integrity()
        return self.scheduler.take_outputs()

    def _waits_for_masks(self, plan: StepPlan) -> bool:
        """Guides know all tokens before this step's only when the last step has ended; the device is busy with this one meanwhile."""
        return self._last is not None and len(plan.guided) > 0

    def _sample(self, plan: StepPlan) -> None:
        self._runner.sample(plan, self.scheduler.masks(plan) if len(plan.guided) else None)
