"""A device that remembers tokens instead of keys and values: it shows whether every sequence sees exactly its own context.

Each slot of the cache holds the token that was written to it. The next token is a hash of the context read back through the block table, so one
wrong block, copy, or order of steps changes the answer. expected_tokens() is the same rule without any engine.
"""

from __future__ import annotations

import hashlib

import numpy as np
from pagetide.runner.plan import StepPlan, StepTokens

VOCABULARY = 50


def next_token(context: list[int], seed: int) -> int:
    digest = hashlib.blake2b(repr((context, seed)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") % VOCABULARY


def expected_tokens(prompt: list[int], num_tokens: int, seed: int) -> list[int]:
    context = list(prompt)
    for _ in range(num_tokens):
        context.append(next_token(context, seed))
    return context[len(prompt) :]


class ContextRunner:
    """A StepRunner over num_blocks blocks; max_tokens is the step's budget, which no plan may exceed."""

    def __init__(self, max_rows: int, max_len: int, num_blocks: int, block_size: int, max_tokens: int):
        self.history = np.full((max_rows, max_len + 1), -1)
        self.block_table = np.full((max_rows, -(-max_len // block_size)), -1)
        self.slots = np.full((num_blocks, block_size), -1)
        self.seeds = [0] * max_rows
        self.max_tokens = max_tokens
        self.results: dict[int, list[int]] = {}
        self.block_size = block_size
        self.num_computed_tokens = 0

    def forward(self, plan: StepPlan) -> None:
        assert 0 < plan.num_tokens <= self.max_tokens, plan.num_tokens
        self.num_computed_tokens += plan.num_tokens
        for admission in plan.admissions:
            self.history[admission.row, : len(admission.token_ids)] = admission.token_ids
            self.block_table[admission.row] = -1
            self.seeds[admission.row] = admission.params.seed
        for row, index, block in zip(plan.block_rows, plan.block_indices, plan.block_ids, strict=True):
            self.block_table[row, index] = block
        for source, target in plan.copies:
            self.slots[target] = self.slots[source]
        # All writes of a step come before its reads, as in every layer of a decoder.
        for row, start, count in zip(plan.rows, plan.starts, plan.counts, strict=True):
            for position in range(start, start + count):
                self.slots[self.block_table[row, position // self.block_size], position % self.block_size] = self.history[row, position]

    def sample(self, plan: StepPlan) -> None:
        tokens = []
        for row, position in zip(plan.sample_rows, plan.sample_positions, strict=True):
            blocks = self.block_table[row, : -(-position // self.block_size)]
            context = self.slots[blocks].reshape(-1)[:position].tolist()
            tokens.append(next_token(context, self.seeds[row]))
        for row, position, token in zip(plan.sample_rows, plan.sample_positions, tokens, strict=True):
            self.history[row, position] = token
        self.results[plan.step] = tokens

    def wait(self, plan: StepPlan) -> StepTokens:
        return StepTokens(np.array(self.results.pop(plan.step), np.int64))
