"""One token for each row of logits, without sorting the vocabulary.

Several programs may share a row where rows are few; the last to end joins what they found and does the rest.
The token of the largest sum of logit and noise is drawn as if nothing was ruled out. Most often top-p and
min-p allow it, which a sum over the row tells; if not, the tokens that are at most as likely are ruled out
too, and the draw is repeated among the others: the largest of a set that lies in a part of it is the part's
largest. For top-k the k-th largest logit is found by bisection of its bits, among the few tokens that a lower
bound leaves.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pagetide.ops.gpu.device import num_processors

_BLOCK = 4096  # logits that a program looks at together
_LISTED = 16384  # candidates for top-k that are listed; if there are more, the logits are read again
_MAX_SPLITS = 16  # programs that share a row


@triton.jit
def _first_of_largest(best, ids):
    """(largest value, the smallest id that has it)."""
    largest = tl.max(best, 0)
    return largest, tl.min(tl.where(best == largest, ids, 2147483647), 0)


@triton.jit
def _mix(x):
    """lowbias32, as in the reference; uint32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _noise(state, token):
    """Gumbel noise, as in the reference."""
    bits = _mix(state ^ _mix(token.to(tl.uint32) + 0x9E3779B9)) >> 9
    uniform = (bits.to(tl.float32) + 0.5) * 1.1920928955078125e-07
    # The largest noise comes from numbers just below 1, whose logarithm a GPU's fast one does not give:
    # there it is the series in what they lack of 1, which is exact.
    lack = ((8388607 - bits.to(tl.int32)).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    series = lack * (
        1.0 + lack * (0.5 + lack * (0.33333334 + lack * (0.25 + lack * (0.2 + lack * 0.16666667))))
    )
    exponential = tl.where(lack < 0.015625, series, -tl.log(uniform))
    return -tl.log(exponential)


@triton.jit
def _key(x):
    """Integers in the order of the floats."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _count(values, num, scale, threshold, BLOCK: tl.constexpr):
    """How many scaled values have a key of at least the threshold."""
    at = tl.arange(0, BLOCK)
    count = tl.zeros([BLOCK], tl.int32)
    for begin in range(0, num, BLOCK):
        inside = begin + at < num
        scaled = tl.load(values + begin + at, mask=inside, other=0.0) * scale
        count += (inside & (_key(scaled) >= threshold)).to(tl.int32)
    return tl.sum(count)


@triton.jit
def _mass(values, num, scale, highest, floor, BLOCK: tl.constexpr):
    """The sum of exp(scaled - highest) over values with a key of at least `floor`."""
    at = tl.arange(0, BLOCK)
    mass = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, num, BLOCK):
        inside = begin + at < num
        scaled = tl.load(values + begin + at, mask=inside, other=0.0) * scale
        mass += tl.where(inside & (_key(scaled) >= floor), tl.exp(scaled - highest), 0.0)
    return tl.sum(mass)


@triton.jit
def _draw(values, ids, is_listed, begin_at, num, scale, state, floor, BLOCK: tl.constexpr):
    """Of the values from begin_at to num with a key of at least `floor` the one with the largest sum with
    noise: (sum, token).
    """
    at = tl.arange(0, BLOCK)
    chosen = tl.full([BLOCK], -float("inf"), tl.float32)
    chosen_ids = tl.zeros([BLOCK], tl.int32)
    for begin in range(begin_at, num, BLOCK):
        inside = begin + at < num
        scaled = tl.load(values + begin + at, mask=inside, other=0.0) * scale
        its_ids = begin + at
        if is_listed:
            its_ids = tl.load(ids + begin + at, mask=inside, other=0)
        noisy = scaled + _noise(state, its_ids)
        is_better = inside & (_key(scaled) >= floor) & (noisy > chosen)
        chosen = tl.where(is_better, noisy, chosen)
        chosen_ids = tl.where(is_better, its_ids, chosen_ids)
    return _first_of_largest(chosen, chosen_ids)


@triton.jit
def _largest(row, begin_at, num, BLOCK: tl.constexpr):
    """Of each lane the largest logit and its token; and how many are no numbers."""
    at = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], -float("inf"), tl.float32)
    ids = tl.zeros([BLOCK], tl.int32)
    is_bad = tl.zeros([BLOCK], tl.int32)
    for begin in range(begin_at, num, BLOCK):
        x = tl.load(row + begin + at, mask=begin + at < num, other=-float("inf"))
        is_bad |= (x != x).to(tl.int32)
        is_better = x > best
        best = tl.where(is_better, x, best)
        ids = tl.where(is_better, begin + at, ids)
    return best, ids, tl.sum(is_bad)


@triton.jit
def _kth_key(row, num, scale, top_k, highest, value_list, id_list, LISTED: tl.constexpr, BLOCK: tl.constexpr):
    """The key of the top_k-th largest scaled value, and how many values are listed: those of at least a
    bound; 0 if they are too many.
    """
    at = tl.arange(0, BLOCK)
    lowest = -2139095041  # the key of minus infinity
    top = _key(highest).to(tl.int64)
    found = 0
    bound = lowest.to(tl.int64)
    if top_k <= BLOCK:
        # The top_k-th largest of the lanes' maxima is at most that of all values.
        best, _, _ = _largest(row, 0, num, BLOCK)
        keys = _key(best * scale)
        high = top
        while bound < high:
            middle = (bound + high + 1) >> 1
            if tl.sum((keys >= middle).to(tl.int32)) >= top_k:
                bound = middle
            else:
                high = middle - 1
        for begin in range(0, num, BLOCK):
            x = tl.load(row + begin + at, mask=begin + at < num, other=-float("inf"))
            kept = ((_key(x * scale) >= bound) & (begin + at < num)).to(tl.int32)
            place = found + tl.cumsum(kept, 0) - 1
            fits = (kept > 0) & (place < LISTED)
            tl.store(value_list + place, x, mask=fits)
            tl.store(id_list + place, begin + at, mask=fits)
            found += tl.sum(kept)
        tl.debug_barrier()
    low, high = bound, top
    if found > LISTED:
        found = 0
    if (found > 0) & (found <= BLOCK):
        keys = _key(tl.load(value_list + at, mask=at < found, other=-float("inf")) * scale)
        while low < high:
            middle = (low + high + 1) >> 1
            if tl.sum(((at < found) & (keys >= middle)).to(tl.int32)) >= top_k:
                low = middle
            else:
                high = middle - 1
    else:
        values, count = row, num
        if found > 0:
            values, count = value_list, found
        while low < high:
            middle = (low + high + 1) >> 1
            if _count(values, count, scale, middle, BLOCK) >= top_k:
                low = middle
            else:
                high = middle - 1
    return low.to(tl.int32), found


# Otherwise batches of some sizes would have the kernel compiled anew, while requests wait.
@triton.jit(
    do_not_specialize=["splits", "slice_size"],
    do_not_specialize_on_alignment=["temperatures", "top_ks", "top_ps", "min_ps", "seeds", "positions"],
)
def _sample(
    logits,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    seeds,
    positions,
    value_lists,
    id_lists,
    found_values,
    found_ids,
    arrivals,
    out,
    splits,
    slice_size,
    VOCABULARY: tl.constexpr,
    DRAWS: tl.constexpr,
    LISTED: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """DRAWS: false where every row takes its likeliest token; then nothing is read but logits."""
    row_id, split = tl.program_id(0), tl.program_id(1)
    row = logits + row_id.to(tl.int64) * VOCABULARY
    begin = split * slice_size
    end = tl.minimum(begin + slice_size, VOCABULARY)
    lanes, lane_ids, is_bad = _largest(row, begin, end, BLOCK)
    largest, token = _first_of_largest(lanes, lane_ids)
    noisy, drawn = largest, token
    scale, state = 1.0, _mix(row_id.to(tl.uint32))
    if DRAWS:
        temperature = tl.load(temperatures + row_id)
        if temperature > 0.0:
            scale = 1.0 / temperature
            seed = tl.load(seeds + row_id)
            state = _mix(((seed >> 32) & 0xFFFFFFFF).to(tl.uint32))
            state = _mix((seed & 0xFFFFFFFF).to(tl.uint32) ^ state)
            state = _mix(state ^ _mix(tl.load(positions + row_id).to(tl.uint32)))
            noisy, drawn = _draw(row, row, False, begin, end, scale, state, -2139095041, BLOCK)
    if splits > 1:
        place = row_id * MAX_SPLITS + split
        tl.store(found_values + place * 2, largest)
        tl.store(found_values + place * 2 + 1, noisy)
        tl.store(found_ids + place * 3, token)
        tl.store(found_ids + place * 3 + 1, drawn)
        tl.store(found_ids + place * 3 + 2, is_bad)
        tl.debug_barrier()  # all of it is stored before the program counts itself
        if tl.atomic_add(arrivals + row_id, 1, sem="acq_rel") < splits - 1:
            return
        tl.store(arrivals + row_id, 0)
        tl.debug_barrier()
        other = tl.arange(0, MAX_SPLITS)
        places = row_id * MAX_SPLITS + other
        there = other < splits
        lowest = -float("inf")
        values = tl.load(found_values + places * 2, mask=there, other=lowest, cache_modifier=".cg")
        sums = tl.load(found_values + places * 2 + 1, mask=there, other=lowest, cache_modifier=".cg")
        tokens = tl.load(found_ids + places * 3, mask=there, other=0, cache_modifier=".cg")
        draws = tl.load(found_ids + places * 3 + 1, mask=there, other=0, cache_modifier=".cg")
        is_bad = tl.sum(tl.load(found_ids + places * 3 + 2, mask=there, other=0, cache_modifier=".cg"))
        largest, token = _first_of_largest(values, tokens)
        noisy, drawn = _first_of_largest(sums, draws)

    is_finite = (largest > -float("inf")) & (largest < float("inf")) & (is_bad == 0)
    if DRAWS:
        temperature = tl.load(temperatures + row_id)
        if is_finite & (temperature > 0.0):
            token = drawn
            top_k, top_p, min_p = tl.load(top_ks + row_id), tl.load(top_ps + row_id), tl.load(min_ps + row_id)
            if ((top_k > 0) & (top_k < VOCABULARY)) | (top_p < 1.0) | (min_p > 0.0):
                highest = largest * scale
                floor = -2139095041  # the key of minus infinity
                values, num, is_listed = row, VOCABULARY, False
                ids = id_lists + row_id.to(tl.int64) * LISTED
                if (top_k > 0) & (top_k < VOCABULARY):
                    value_list = value_lists + row_id.to(tl.int64) * LISTED
                    floor, found = _kth_key(
                        row, VOCABULARY, scale, top_k, highest, value_list, ids, LISTED, BLOCK
                    )
                    if found > 0:
                        values, num, is_listed = value_list, found, True
                allowed = floor
                if min_p > 0.0:
                    allowed = tl.maximum(allowed, _key(highest + tl.log(min_p)))
                key = _key(tl.load(row + token) * scale)
                if key < allowed:
                    _, token = _draw(values, ids, is_listed, 0, num, scale, state, allowed, BLOCK)
                    key = _key(tl.load(row + token) * scale)
                if top_p < 1.0:
                    # A token stays if the likelier ones have less than top_p of the mass.
                    wanted = top_p * _mass(values, num, scale, highest, floor, BLOCK)
                    top = _key(highest)
                    while (key < top) & (_mass(values, num, scale, highest, key + 1, BLOCK) >= wanted):
                        _, token = _draw(values, ids, is_listed, 0, num, scale, state, key + 1, BLOCK)
                        key = _key(tl.load(row + token) * scale)
    tl.store(out + row_id, tl.where(is_finite, token, -1).to(tl.int64))


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """reference.argmax"""
    return _launch(logits, None)


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seed: torch.Tensor,
    position: torch.Tensor,
) -> torch.Tensor:
    """reference.sample: the same tokens, but where a sum in another order puts one at top_p's border on its
    other side.
    """
    return _launch(logits, (temperature, top_k, top_p, min_p, seed, position))


def _launch(logits: torch.Tensor, rules: tuple[torch.Tensor, ...] | None) -> torch.Tensor:
    rows, vocabulary = logits.shape
    device = logits.device
    out = torch.empty(rows, dtype=torch.int64, device=device)
    if not rows:
        return out
    splits = max(1, min(_MAX_SPLITS, 2 * num_processors(device) // rows, triton.cdiv(vocabulary, _BLOCK)))
    slice_size = triton.cdiv(triton.cdiv(vocabulary, splits), _BLOCK) * _BLOCK
    listed = rows * _LISTED if rules else 1
    _sample[(rows, splits)](
        logits,
        *(rules or (None,) * 6),
        torch.empty(listed, dtype=torch.float32, device=device),
        torch.empty(listed, dtype=torch.int32, device=device),
        torch.empty(rows * _MAX_SPLITS * 2, dtype=torch.float32, device=device),
        torch.empty(rows * _MAX_SPLITS * 3, dtype=torch.int32, device=device),
        torch.zeros(rows, dtype=torch.int32, device=device),
        out,
        splits,
        slice_size,
        vocabulary,
        rules is not None,
        _LISTED,
        _MAX_SPLITS,
        _BLOCK,
        num_warps=8,
    )
    return out
