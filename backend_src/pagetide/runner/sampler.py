"""Logits to tokens, for all sampled rows at once, and the log-probabilities that were asked for."""

from __future__ import annotations

from itertools import islice

import numpy as np
import torch

from pagetide.ops import reference
from pagetide.ops.comm import ALONE, Comm
from pagetide.ops.table import Ops
from pagetide.runner.plan import BeamCandidates, StepPlan, StepTokens, TokenScores
from pagetide.runner.plan_tensors import PlanTensors
from pagetide.runner.rows import Rows


class Sampler:
    """Samples a plan's tokens and writes them into the rows' history, where the next step reads them; on
    ranks other than 0, which have no logits, those that rank 0 has sampled.
    """

    def __init__(self, rows: Rows, ops: Ops, comm: Comm = ALONE):
        self._rows = rows
        self._ops = ops
        self._comm = comm

    def __call__(
        self, plan: StepPlan, tensors: PlanTensors, logits: torch.Tensor, masks: np.ndarray | None
    ) -> list[torch.Tensor]:
        """logits float32 [m, vocabulary], changed in place; masks of plan.guided_rows.

        Returns what read_results takes.
        """
        state = self._rows
        rows, positions = tensors.sample_rows, tensors.sample_positions
        if self._comm.rank:
            return [self.draw(logits, rows[: plan.num_sampled], positions[: plan.num_sampled])]
        raw = _take(logits, tensors.score_index, plan.adjusts_logits)
        raw_of_beams = _take(logits, tensors.beam_index, will_change=True) if plan.adjusts_logits else None
        returned = _take(
            logits, tensors.return_index, will_change=True
        )  # the next step's logits take their place
        sampled, own = logits[: plan.num_sampled], rows[: plan.num_sampled]
        places = positions[: plan.num_sampled]
        if masks is not None:
            state.set_masks(tensors.guided_rows, masks)
        self._adjust(plan, sampled, own, places)
        ids = self.draw(sampled, own, places, plan.is_greedy)
        known = ids.clamp(min=0)
        results = [ids]
        if raw is not None:
            chosen = tensors.score_index
            results += self._ops.score(raw, state.history[rows[chosen], positions[chosen]], plan.num_top)
        if len(plan.beam_index):
            chosen = tensors.beam_index
            results += self._candidates(plan, sampled[chosen], known[chosen], raw_of_beams)
        return results if returned is None else [*results, returned]

    def draw(
        self, logits: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor, is_greedy: bool = False
    ) -> torch.Tensor:
        """Tokens int64 [s] from logits [s, vocabulary], as the rows' parameters say, also written into the
        rows' history.
        """
        if self._comm.rank:
            ids = torch.empty_like(rows, dtype=torch.int64)
        elif is_greedy:
            ids = self._ops.argmax(logits)
        else:
            ids = self._sample(logits, rows, positions)
        if len(rows):
            self._comm.broadcast(ids)
        # A row without a token has ended, but its next step may be on its way: that reads token 0.
        self._rows.history[rows, positions] = ids.clamp(min=0)
        return ids

    def _candidates(
        self, plan: StepPlan, logits: torch.Tensor, ids: torch.Tensor, raw: torch.Tensor | None
    ) -> list[torch.Tensor]:
        """BeamCandidates' fields.

        logits: of the plan's beams, after all changes; raw: before them, None if there were none.
        """
        _, _, tokens, scores = self._ops.score(logits, ids, max(plan.num_candidates, plan.num_top))
        if raw is None:
            ranks = torch.arange(1, tokens.shape[1] + 1, device=tokens.device).expand_as(tokens)
            return [tokens, scores, scores, ranks, tokens[:, : plan.num_top], scores[:, : plan.num_top]]
        top = self._ops.score(raw, ids, plan.num_top)[2:]
        logprobs, ranks = reference.score_many(raw, tokens)
        return [tokens, scores, logprobs, ranks, *top]

    def _adjust(
        self, plan: StepPlan, logits: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor
    ) -> None:
        state = self._rows
        if plan.has_penalties:
            names = ("num_prompt", "repetition_penalty", "presence_penalty", "frequency_penalty")
            params = state.params_of(rows)
            self._ops.penalize(logits, state.history, rows, positions, *(params[name] for name in names))
        if plan.has_edits:
            num_prompt = state.params_of(rows)["num_prompt"]
            self._ops.edit(logits, state.history, rows, positions, num_prompt, state.edits)
        if plan.has_masks:
            self._ops.mask(logits, state.masks, state.is_masked, rows)

    def _sample(self, logits: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        names = ("temperature", "top_k", "top_p", "min_p", "seed")
        params = self._rows.params_of(rows)
        return self._ops.sample(logits, *(params[name] for name in names), positions)


def _take(logits: torch.Tensor, index: torch.Tensor, will_change: bool) -> torch.Tensor | None:
    """Some rows as the model gave them."""
    if not len(index):
        return None
    return logits if len(index) == len(logits) and not will_change else logits[index]


def read_results(plan: StepPlan, results: list[np.ndarray]) -> StepTokens:
    """What a step's sampler returned, on the host."""
    left = iter(results)
    ids = next(left)

    def take_scores() -> TokenScores:
        return TokenScores(*islice(left, 4))

    scores = take_scores() if len(plan.score_index) else None
    candidates = BeamCandidates(*islice(left, 6)) if len(plan.beam_index) else None
    return StepTokens(ids, scores, candidates, logits=next(left, None))
