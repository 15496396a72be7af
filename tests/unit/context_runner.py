"""A device that remembers tokens instead of keys and values: it shows whether every sequence sees exactly
its own context.

Each slot of the cache holds the token that was written to it, and which adapter its row had. The logits of
the next token are a hash of the context read back through the block table, so one wrong block, copy, adapter
or order of steps changes the answer. expected_tokens() is the same rule without any engine.
"""

from __future__ import annotations

import hashlib

import numpy as np
from pagetide.runner.plan import NO_ADAPTER, NO_TOKEN, BeamCandidates, StepPlan, StepTokens, TokenScores

VOCABULARY = 50


def logits_after(context: list[int], seed: int) -> np.ndarray:
    """Log-probabilities of all tokens, float64 [VOCABULARY]. With odd seeds every other answer token or so is
    the one that followed where the last one stood before, as those who guess expect.
    """
    digest = hashlib.blake2b(repr((context, seed)).encode(), digest_size=8).digest()
    raw = np.random.default_rng(int.from_bytes(digest, "little")).normal(size=VOCABULARY) * 2
    if seed % 2 and digest[0] % 2 and context[-1] in context[:-1]:
        before = max(i for i, token in enumerate(context[:-1]) if token == context[-1])
        raw[context[before + 1] % VOCABULARY] += 20
    return raw - np.log(np.exp(raw).sum())


def next_token(context: list[int], seed: int) -> int:
    return int(logits_after(context, seed).argmax())


def with_adapter(tokens: list[int], adapter: int) -> list[int]:
    """What slots of the cache hold of them. adapter: its number, 0: none."""
    return [token + VOCABULARY * adapter for token in tokens]


def expected_tokens(prompt: list[int], num_tokens: int, seed: int, adapter: int = 0) -> list[int]:
    context = list(prompt)
    for _ in range(num_tokens):
        context.append(next_token(with_adapter(context, adapter), seed))
    return context[len(prompt) :]


class ContextRunner:
    """A StepRunner over num_blocks blocks; max_tokens is the step's budget, which no plan may exceed."""

    def __init__(
        self,
        max_rows: int,
        max_len: int,
        num_blocks: int,
        block_size: int,
        max_tokens: int,
        num_host_blocks: int = 0,
    ):
        self.host_slots = np.full((num_host_blocks, block_size), -1)
        self.history = np.full((max_rows, max_len + 1), -1)
        self.block_table = np.full((max_rows, -(-max_len // block_size)), -1)
        self.slots = np.full((num_blocks, block_size), -1)
        self.seeds = [0] * max_rows
        self.adapter_places = [NO_ADAPTER] * max_rows
        self.adapters = {NO_ADAPTER: 0}  # number by place
        self.lengths = np.zeros(max_rows, int)
        self.max_tokens = max_tokens
        self.results: dict[int, StepTokens] = {}
        self.block_size = block_size
        self.num_computed_tokens = 0
        self.looked_at = np.empty(0, np.int32)  # tokens of the last step whose logits were asked for

    def forward(self, plan: StepPlan) -> None:
        assert 0 < plan.num_tokens <= self.max_tokens, plan.num_tokens
        self.num_computed_tokens += plan.num_tokens
        if (load := plan.adapter_load) is not None:
            self.adapters[load.place] = int(load.tensors["number"])
        for admission in plan.admissions:
            self.adapter_places[admission.row] = admission.adapter
            self.history[admission.row, : len(admission.token_ids)] = admission.token_ids
            self.block_table[admission.row] = -1
            self.seeds[admission.row] = admission.params.seed
            self.lengths[admission.row] = admission.num_computed
        for draft in plan.drafts:
            self.lengths[draft.row] = draft.num_computed
            first = draft.num_computed + 1
            self.history[draft.row, first : first + len(draft.token_ids)] = draft.token_ids
        assert len({(r, i) for r, i in zip(plan.block_rows, plan.block_index, strict=True)}) == len(
            plan.block_rows
        ), "a place is written twice"
        for row, index, block in zip(plan.block_rows, plan.block_index, plan.block_ids, strict=True):
            self.block_table[row, index] = block
        for source, target, pairs in (
            (self.slots, self.host_slots, plan.swap_outs),
            (self.host_slots, self.slots, plan.swap_ins),
            (self.slots, self.slots, plan.copies),
        ):
            sources, targets = pairs[:, 0].tolist(), pairs[:, 1].tolist()
            assert len(set(targets)) == len(targets), "a device may run all copies at once"
            assert source is not target or not set(targets) & set(sources)
            for block, other in pairs:
                target[other] = source[block]
        # All writes of a step come before its reads, as in every layer of a decoder.
        assert (self.lengths[plan.rows] == plan.starts).all(), (
            "host and device count a row's tokens differently"
        )
        self.lengths[plan.rows] += plan.counts
        numbers = [self.adapters[self.adapter_places[row]] for row in plan.rows]
        assert plan.has_adapters == any(numbers)
        for row, start, count, number in zip(plan.rows, plan.starts, plan.counts, numbers, strict=True):
            for position in range(start, start + count):
                self.slots[self.block_table[row, position // self.block_size], position % self.block_size] = (
                    self.history[row, position] + VOCABULARY * number
                )

    def sample(self, plan: StepPlan, masks: np.ndarray | None = None) -> None:
        self.looked_at = plan.logit_index
        logits = []
        for row, position in zip(plan.sample_rows, plan.sample_positions, strict=True):
            blocks = self.block_table[row, : -(-position // self.block_size)]
            logits.append(logits_after(self.slots[blocks].reshape(-1)[:position].tolist(), self.seeds[row]))
        masked = [values.copy() for values in logits[: plan.num_sampled]]
        for row, words in zip(plan.guided_rows, masks if masks is not None else (), strict=True):
            allowed = np.unpackbits(words.view(np.uint8), bitorder="little")[:VOCABULARY]
            masked[plan.sample_rows[: plan.num_sampled].tolist().index(row)][allowed == 0] = -np.inf
        tokens = [int(values.argmax()) if np.isfinite(values.max()) else NO_TOKEN for values in masked]
        for row, position, token in zip(plan.sample_rows, plan.sample_positions, tokens, strict=False):
            self.history[row, position] = max(token, 0)
        targets = self.history[plan.sample_rows, plan.sample_positions]
        self.results[plan.step] = StepTokens(
            ids=np.array(tokens, np.int64),
            scores=scores_of([logits[i] for i in plan.score_index], targets[plan.score_index], plan.num_top)
            if len(plan.score_index)
            else None,
            candidates=candidates_of(masked, logits, plan) if len(plan.beam_index) else None,
            logits=np.array([logits[i] for i in plan.return_index], np.float32)
            if len(plan.return_index)
            else None,
        )

    def wait(self, plan: StepPlan) -> StepTokens:
        return self.results.pop(plan.step)

    def close(self) -> None:
        assert not self.results


def candidates_of(masked: list[np.ndarray], logits: list[np.ndarray], plan: StepPlan) -> BeamCandidates:
    rows, raw = (np.array([values[i] for i in plan.beam_index]) for values in (masked, logits))
    ids = np.argsort(-rows, axis=1)[:, : plan.num_candidates]
    logprobs = np.take_along_axis(raw, ids, 1)
    ranks = (raw[:, None, :] > logprobs[:, :, None]).sum(2) + 1
    top = np.argsort(-raw, axis=1)[:, : plan.num_top]
    return BeamCandidates(
        ids, np.take_along_axis(rows, ids, 1), logprobs, ranks, top, np.take_along_axis(raw, top, 1)
    )


def scores_of(logits: list[np.ndarray], tokens: np.ndarray, num_top: int) -> TokenScores:
    rows = np.array(logits)
    own = rows[np.arange(len(rows)), tokens]
    top = np.argsort(-rows, axis=1)[:, :num_top]
    return TokenScores(own, (rows > own[:, None]).sum(1) + 1, top, np.take_along_axis(rows, top, 1))
