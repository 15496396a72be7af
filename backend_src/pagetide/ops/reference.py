"""Every operation in plain torch, on any device: the truth that the kernels are compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from pagetide.ops.batch import LogitEdits

_MASK_32 = 0xFFFFFFFF


def gather(
    history: torch.Tensor,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    rows: torch.Tensor,
    counts: torch.Tensor,
    num_tokens: int,
    block_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A step's tokens: sequence i has the next counts[i] of row rows[i], which has lengths[rows[i]] so far.

    rows, counts int32 [n]; num_tokens in all; history int64 [max_rows, max_len], block_table int32
    [max_rows, max_blocks], lengths int32 [max_rows], to which counts are added in place.
    Returns ids, positions and slots int64 [t], and the sequences' block tables int32 [n, max_blocks] and new
    lengths int32 [n].
    """
    counts, rows = counts.long(), rows.long()
    starts = lengths[rows].long()
    lengths[rows] += counts.int()
    # The first token of sequence i stands at sum(counts[:i]) in the step.
    shift = starts - (counts.cumsum(0) - counts)
    positions = torch.arange(num_tokens, device=rows.device)
    positions = positions + shift.repeat_interleave(counts, output_size=num_tokens)
    owners = rows.repeat_interleave(counts, output_size=num_tokens)
    blocks = block_table[owners, positions // block_size].long()
    slots = blocks * block_size + positions % block_size
    return history[owners, positions], positions, slots, block_table[rows], lengths[rows]


def copy_blocks(source: torch.Tensor, target: torch.Tensor, pairs: torch.Tensor) -> None:
    """Copies whole blocks of all layers between pools [layers, blocks, ...], or within one.

    pairs int32 [c, 2]: block of the source, block of the target; no target is also a source.
    """
    sources, targets = pairs[:, 0].to(source.device), pairs[:, 1].to(target.device)
    target[:, targets] = source[:, sources].to(target.device)


def set_blocks(block_table: torch.Tensor, rows: torch.Tensor, index: torch.Tensor, ids: torch.Tensor) -> None:
    """block_table[rows, index] = ids, in place; all int32 [d]. Negative rows count from the end."""
    block_table[rows, index] = ids


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root mean square norm over the last dimension, computed in float32 (arXiv:1910.07467).

    x [..., size], weight [size], which may be wider than x.
    """
    wide = x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return ((wide * scale).to(weight.dtype) * weight).to(x.dtype)


def add_rms_norm(
    x: torch.Tensor | None, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """Adds x, if there is one, to the residual, in place, and returns the norm of the sum.

    x, residual [t, size].
    """
    if x is not None:
        residual += x
    return rms_norm(residual, weight, eps)


def gated(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """activation(gate) * up of [t, 2 * size], gate first; returns [t, size] (arXiv:2002.05202).

    activation: "silu", or "gelu", which is its approximation by tanh.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up


def apply_rotary(x: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    """Rotates pairs (i, i + head_dim/2) of x [t, heads, head_dim] by cos_sin float32 [t, head_dim]
    (cosines, then sines; arXiv:2104.09864).
    """
    cos, sin = cos_sin.unsqueeze(1).chunk(2, dim=-1)
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """The most likely token of each row: [s, vocabulary] -> int64 [s]; -1 where the largest is not finite,
    or one is no number.
    """
    best = logits.max(-1)  # a value that is no number goes before all others
    return torch.where(best.values.isfinite(), best.indices, -1)


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seed: torch.Tensor,
    position: torch.Tensor,
) -> torch.Tensor:
    """One token for each row of logits float32 [s, vocabulary]; all parameters [s]. Returns int64 [s].

    Temperature 0 is the argmax. Otherwise: scale, keep the top_k likeliest, of those the smallest set with
    probability top_p, of those the ones with at least min_p of the likeliest's probability (ties at a
    border are all kept), and draw by the Gumbel-max rule with noise that is a function of (seed, position,
    token): the same row gives the same token in any batch. -1 where no logit is finite, as in argmax.
    """
    likeliest = argmax(logits)
    logits = torch.where((likeliest < 0).unsqueeze(1), 0.0, logits)
    is_greedy = temperature == 0
    scaled = logits / torch.where(is_greedy, 1.0, temperature).unsqueeze(1)
    ordered = scaled.sort(-1, descending=True).values
    vocabulary = logits.shape[-1]
    k = torch.where(top_k <= 0, vocabulary, top_k).clamp(max=vocabulary)
    kth = ordered.gather(1, (k - 1).unsqueeze(1))
    ordered = ordered.masked_fill(ordered < kth, -torch.inf)
    probabilities = ordered.softmax(-1)
    # A token is outside when those before it already reach top_p.
    outside = probabilities.cumsum(-1) - probabilities >= top_p.unsqueeze(1)
    outside[:, 0] = False
    threshold = ordered.masked_fill(outside, torch.inf).min(-1, keepdim=True).values
    threshold = torch.maximum(threshold, kth)
    threshold = torch.maximum(threshold, ordered[:, :1] + min_p.unsqueeze(1).log())
    noisy = (scaled + gumbel_noise(seed, position, vocabulary)).masked_fill(scaled < threshold, -torch.inf)
    return torch.where(is_greedy | (likeliest < 0), likeliest, noisy.argmax(-1))


def penalize(
    logits: torch.Tensor,
    history: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    num_prompt: torch.Tensor,
    repetition: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
) -> None:
    """Lowers, in place, the logits [s, vocabulary] of tokens that row rows[i] of history [max_rows,
    max_len] has before positions[i].

    Repetition (arXiv:1909.05858) looks at prompt and answer, presence and frequency (OpenAI's) at the
    answer, as in vLLM. Parameters [s].
    """
    tokens = history[rows]
    at = torch.arange(tokens.shape[1], device=tokens.device)
    is_past = at < positions.unsqueeze(1)
    in_answer = is_past & (at >= num_prompt.unsqueeze(1))
    seen = torch.zeros_like(logits).scatter_add_(1, tokens, is_past.float())
    counts = torch.zeros_like(logits).scatter_add_(1, tokens, in_answer.float())
    factor = repetition.unsqueeze(1)
    penalized = torch.where(seen > 0, torch.where(logits > 0, logits / factor, logits * factor), logits)
    logits.copy_(penalized - frequency.unsqueeze(1) * counts - presence.unsqueeze(1) * (counts > 0))


def edit(
    logits: torch.Tensor,
    history: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    num_prompt: torch.Tensor,
    edits: LogitEdits,
) -> None:
    """Adds, in place, the biases of the rows' edits (LogitEdits) to logits [s, vocabulary].

    Other shapes as in penalize.
    """
    for i, row in enumerate(rows.tolist()):
        for e in range(int(edits.starts[row]), int(edits.starts[row + 1])):
            prefix = edits.prefixes[edits.prefix_starts[e] : edits.prefix_starts[e + 1]]
            begin = int(positions[i]) - len(prefix)
            if (
                positions[i] < edits.below[e]
                and begin >= num_prompt[i]
                and torch.equal(history[row, begin : positions[i]], prefix.long())
            ):
                logits[i, edits.tokens[e]] += edits.biases[e]


def mask(logits: torch.Tensor, masks: torch.Tensor, is_masked: torch.Tensor, rows: torch.Tensor) -> None:
    """Sets, in place, logits [s, vocabulary] to -inf where the token's bit is 0 in masks int32 [max_rows,
    words], if is_masked [max_rows].
    """
    bits = masks[rows].unsqueeze(-1) >> torch.arange(32, device=masks.device, dtype=torch.int32) & 1
    is_out = (bits.flatten(1)[:, : logits.shape[1]] == 0) & is_masked[rows].unsqueeze(1)
    logits.masked_fill_(is_out, -torch.inf)


def score(logits: torch.Tensor, ids: torch.Tensor, num_top: int) -> list[torch.Tensor]:
    """Log-probabilities of one token for each row of logits float32 [w, vocabulary]; ids int64 [w].

    Returns log-probability float32 [w], rank int64 [w] (1: the likeliest), the num_top likeliest tokens
    int64 [w, k] and their log-probabilities.
    """
    own = logits.gather(1, ids.unsqueeze(1))
    total = logits.logsumexp(-1, keepdim=True)
    ranks = (logits > own).sum(1) + 1
    top = logits.topk(min(num_top, logits.shape[1]), -1)
    return [(own - total).squeeze(1), ranks, top.indices, top.values - total]


def score_many(logits: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities float32 [b, k] and ranks int64 [b, k] (1: the likeliest) of k tokens for each row
    of logits float32 [b, vocabulary].
    """
    own = logits.gather(1, ids)
    ordered = logits.sort(-1, descending=True).values
    # Searching upwards in negated values: how many are larger.
    ranks = torch.searchsorted(-ordered, -own) + 1
    return own - logits.logsumexp(-1, keepdim=True), ranks


def gumbel_noise(seed: torch.Tensor, position: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Gumbel noise float32 [s, vocabulary], a pure function of (seed, position, token); seed, position
    integers [s].
    """
    # Integers of 32 bits would lose what the hash multiplies.
    seed, position = seed.long(), position.long()
    token = torch.arange(vocabulary, device=seed.device).unsqueeze(0)
    state = _mix((seed & _MASK_32) ^ _mix((seed >> 32) & _MASK_32))
    state = _mix(state ^ _mix(position & _MASK_32)).unsqueeze(1)
    bits = _mix(state ^ _mix(token + 0x9E3779B9 & _MASK_32))
    return -(-uniform(bits).log()).log()


def uniform(bits: torch.Tensor) -> torch.Tensor:
    """32 random bits (int64) as a float32 between 0 and 1, neither included."""
    # 23 bits and a half are exact in float32: with one more the largest would round to 1, and its noise
    # would be infinite.
    return ((bits >> 9).float() + 0.5) * 2.0**-23


def _mix(x: torch.Tensor) -> torch.Tensor:
    """A 32-bit integer hash with good avalanche (lowbias32, nullprogram.com/blog/2018/07/31), in int64 so
    that every device has it.
    """
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK_32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK_32
    return x ^ (x >> 16)
