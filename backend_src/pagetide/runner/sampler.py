"""Logits to tokens, for all sampled rows at once, and the log-probabilities that were asked for."""

from __future__ import annotations

from itertools import islice

import numpy as np
import torch

from pagetide.ops.table import Ops
from pagetide.runner.plan import StepPlan, StepTokens, TokenScores
from pagetide.runner.rows import Rows


class Sampler:
    """Samples a plan's tokens and writes them into the rows' history, where the next step reads them."""

    def __init__(self, rows: Rows, ops: Ops):
        self._rows = rows
        self._ops = ops

    def __call__(self, plan: StepPlan, logits: torch.Tensor, masks: np.ndarray | None) -> list[torch.Tensor]:
        """logits float32 [m, vocabulary], changed in place; masks of plan.guided. Returns what read_results takes."""
        state = self._rows
        rows = state.indices(plan.sample_rows)
        positions = state.indices(plan.sample_positions)
        raw = self._take(logits, plan.scored, plan.adjusts_logits)
        kept = self._take(logits, plan.kept, will_change=True)  # the next step's logits take their place
        sampled, own = logits[: plan.num_sampled], rows[: plan.num_sampled]
        places = positions[: plan.num_sampled]
        if masks is not None:
            state.set_masks(plan.guided, masks)
        self._adjust(plan, sampled, own, places)
        ids = self._ops.argmax(sampled) if plan.is_greedy else self._sample(sampled, own, places)
        state.history[own, places] = ids
        results = [ids]
        if raw is not None:
            chosen = state.indices(plan.scored)
            results += self._ops.score(raw, state.history[rows[chosen], positions[chosen]], plan.num_top)
        if len(plan.beams):
            chosen = state.indices(plan.beams)
            results += self._ops.score(sampled[chosen], ids[chosen], plan.num_candidates)
        return results if kept is None else [*results, kept]

    def _take(self, logits: torch.Tensor, index: np.ndarray, will_change: bool) -> torch.Tensor | None:
        """Some rows as the model gave them."""
        if not len(index):
            return None
        return logits if len(index) == len(logits) and not will_change else logits[self._rows.indices(index)]

    def _adjust(self, plan: StepPlan, logits: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor) -> None:
        state = self._rows
        if plan.has_penalties:
            names = ("num_prompt", "repetition_penalty", "presence_penalty", "frequency_penalty")
            self._ops.penalize(logits, state.history, rows, positions, *(state.params[name][rows] for name in names))
        if plan.has_edits:
            self._ops.edit(logits, state.history, rows, positions, state.params["num_prompt"][rows], state.edits)
        if plan.has_masks:
            self._ops.mask(logits, state.masks, state.is_masked, rows)

    def _sample(self, logits: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        names = ("temperature", "top_k", "top_p", "min_p", "seed")
        return self._ops.sample(logits, *(self._rows.params[name][rows] for name in names), positions)


def read_results(plan: StepPlan, results: list[np.ndarray]) -> StepTokens:
    """What a step's sampler returned, on the host."""
    left = iter(results)
    ids = next(left)

    def take_scores() -> TokenScores:
        return TokenScores(*islice(left, 4))

    scores = take_scores() if len(plan.scored) else None
    candidates = take_scores() if len(plan.beams) else None
    return StepTokens(ids, scores, candidates, logits=next(left, None))
