"""Changes of logits before sampling: penalties, edits of single tokens, masks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pagetide.ops.batch import LogitEdits

_BLOCK = 1024


@triton.jit(
    do_not_specialize_on_alignment=[
        "rows",
        "positions",
        "num_prompts",
        "repetitions",
        "presences",
        "frequencies",
    ]
)
def _penalize(
    logits,
    history,
    rows,
    positions,
    num_prompts,
    repetitions,
    presences,
    frequencies,
    firsts,
    counts,
    max_len,
    VOCABULARY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """firsts: of each token the first position that it stands at, or the largest integer; counts: how often
    the answer has it, or 0. Both are so before and after.
    """
    i = tl.program_id(0).to(tl.int64)
    length = tl.load(positions + i)
    num_prompt = tl.load(num_prompts + i)
    tokens = history + tl.load(rows + i).to(tl.int64) * max_len
    firsts += i * VOCABULARY
    counts += i * VOCABULARY
    at = tl.arange(0, BLOCK)
    for begin in range(0, length, BLOCK):
        position = begin + at
        inside = position < length
        token = tl.load(tokens + position, mask=inside, other=0)
        tl.atomic_min(firsts + token, position, mask=inside)
        tl.atomic_add(counts + token, 1, mask=inside & (position >= num_prompt))
    tl.debug_barrier()
    repetition, presence = tl.load(repetitions + i), tl.load(presences + i)
    frequency = tl.load(frequencies + i)
    for begin in range(0, length, BLOCK):
        position = begin + at
        inside = position < length
        token = tl.load(tokens + position, mask=inside, other=0)
        is_first = inside & (tl.load(firsts + token, mask=inside, other=-1, cache_modifier=".cg") == position)
        count = tl.load(counts + token, mask=is_first, other=0, cache_modifier=".cg").to(tl.float32)
        place = logits + i * VOCABULARY + token
        x = tl.load(place, mask=is_first, other=0.0)
        x = tl.where(x > 0, tl.div_rn(x, repetition), x * repetition)
        x = x - frequency * count - tl.where(count > 0, presence, 0.0)
        tl.store(place, x, mask=is_first)
    tl.debug_barrier()
    for begin in range(0, length, BLOCK):
        position = begin + at
        inside = position < length
        token = tl.load(tokens + position, mask=inside, other=0)
        tl.store(firsts + token, 2147483647, mask=inside)
        tl.store(counts + token, 0, mask=inside)


class Penalties:
    """penalize(), with the memory that it counts in: two numbers for each logit of a step."""

    def __init__(self) -> None:
        self._firsts = torch.empty(0)
        self._counts = torch.empty(0)

    def __call__(
        self,
        logits: torch.Tensor,
        history: torch.Tensor,
        rows: torch.Tensor,
        positions: torch.Tensor,
        num_prompt: torch.Tensor,
        repetition: torch.Tensor,
        presence: torch.Tensor,
        frequency: torch.Tensor,
    ) -> None:
        """reference.penalize: it takes time for the tokens of a row, not for the vocabulary."""
        if self._firsts.numel() < logits.numel():
            self._firsts = torch.full_like(logits, 2147483647, dtype=torch.int32)
            self._counts = torch.zeros_like(logits, dtype=torch.int32)
        _penalize[(len(logits),)](
            logits, history, rows, positions, num_prompt, repetition, presence, frequency, self._firsts,
            self._counts, history.shape[1], logits.shape[1], _BLOCK,
        )  # fmt: skip


@triton.jit(
    do_not_specialize_on_alignment=[
        "rows",
        "positions",
        "num_prompts",
        "starts",
        "tokens",
        "biases",
        "below",
        "prefix_starts",
        "prefixes",
    ]
)
def _edit(
    logits,
    history,
    rows,
    positions,
    num_prompts,
    starts,
    tokens,
    biases,
    below,
    prefix_starts,
    prefixes,
    max_len,
    VOCABULARY: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + i).to(tl.int64)
    position = tl.load(positions + i)
    num_prompt = tl.load(num_prompts + i)
    # Edits of one token must add up: one after the other.
    for e in range(tl.load(starts + row), tl.load(starts + row + 1)):
        first = tl.load(prefix_starts + e)
        length = tl.load(prefix_starts + e + 1) - first
        begin = position - length
        applies = (position < tl.load(below + e)) & (begin >= num_prompt)
        if applies:
            differences = 0
            for k in range(length):
                said = tl.load(history + row * max_len + begin + k)
                differences += (said != tl.load(prefixes + first + k)).to(tl.int32)
            if differences == 0:
                place = logits + i * VOCABULARY + tl.load(tokens + e)
                tl.store(place, tl.load(place) + tl.load(biases + e))
                tl.debug_barrier()


def edit(
    logits: torch.Tensor,
    history: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    num_prompt: torch.Tensor,
    edits: LogitEdits,
) -> None:
    """reference.edit in one launch."""
    _edit[(len(logits),)](
        logits, history, rows, positions, num_prompt, edits.starts, edits.tokens, edits.biases, edits.below,
        edits.prefix_starts, edits.prefixes, history.shape[1], logits.shape[1], num_warps=1,
    )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=["rows"])
def _mask(logits, masks, is_masked, rows, words, VOCABULARY: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + i).to(tl.int64)
    if tl.load(is_masked + row) == 0:
        return
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = token < VOCABULARY
    word = tl.load(masks + row * words + token // 32, mask=inside, other=-1)
    is_out = inside & (((word >> (token % 32)) & 1) == 0)
    tl.store(logits + i * VOCABULARY + token, -float("inf"), mask=is_out)


def mask(logits: torch.Tensor, masks: torch.Tensor, is_masked: torch.Tensor, rows: torch.Tensor) -> None:
    """reference.mask in one launch."""
    count, vocabulary = logits.shape
    _mask[(count, triton.cdiv(vocabulary, _BLOCK))](
        logits, masks, is_masked, rows, masks.shape[1], vocabulary, _BLOCK
    )
