"""Sampling one row per thread: the rules of ops/reference.py, without sorting the vocabulary."""

from __future__ import annotations

import numpy as np
import torch
from numba import prange

from pagetide.ops.cpu.compiled import device_function, fast_exp, kernel

NO_TOKEN = -1  # runner/plan.py's: no logit is finite
_MASK_32 = np.uint64(0xFFFFFFFF)
_MINUS_INFINITY = np.float32(-np.inf)
_MAX_DOUBLINGS = 20  # of the reach below the peak; what is a million nats less likely is looked for among all
_MAX_HALVINGS = 12  # of the room in which a border is looked for
_FEW = 64  # values that may be sorted without having been asked for
_MANY = 500  # values; fewer get their noise one by one
_SPAN = 64  # values that are looked at together
_BUCKETS = 256  # of an eighth of a nat each; what is further from the peak shares the last one


@kernel
def _argmax(num_rows, logits, out):  # type: ignore[no-untyped-def]
    for row in prange(num_rows):
        out[row] = _argmax_row(logits[row])


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """Likeliest token of each row: logits [s, vocabulary] float32 -> [s] int64."""
    out = torch.empty(logits.shape[0], dtype=torch.int64)
    _argmax(len(out), logits.numpy(), out.numpy())
    return out


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seed: torch.Tensor,
    position: torch.Tensor,
) -> torch.Tensor:
    """As ops.reference.sample."""
    out = torch.empty(logits.shape[0], dtype=torch.int64)
    rows = (temperature, top_k, top_p, min_p, seed, position)
    _sample(len(out), logits.numpy(), *(values.numpy() for values in rows), out.numpy())
    return out


@kernel
def _sample(num_rows, logits, temperature, top_k, top_p, min_p, seed, position, out):  # type: ignore[no-untyped-def]
    for row in prange(num_rows):
        values = logits[row]
        at = _argmax_row(values)
        if at >= 0 and temperature[row] > 0:
            scaled = values / temperature[row]
            threshold = _threshold(scaled, scaled[at], top_k[row], top_p[row], min_p[row])
            at = _gumbel_argmax(scaled, at, threshold, np.uint64(seed[row]), np.uint64(position[row]))
        out[row] = at


@device_function
def _order(bits):  # type: ignore[no-untyped-def]
    """A float32's bits as an integer that is larger where the float is: what is no number lies beyond the
    infinities.
    """
    return bits ^ (bits >> np.int32(31) & np.int32(0x7FFFFFFF))


_INFINITE = np.int32(0x7F800000)  # _order of infinity
_MINUS_INFINITE = np.int32(-0x7F800001)


@device_function
def _argmax_row(values):  # type: ignore[no-untyped-def]
    """Where the largest value is; NO_TOKEN if that is not finite, or some value is no number: nothing can
    be said of such a row.
    """
    # Vectors have no largest of floats that stops at what is no number; of integers they have.
    bits = values.view(np.int32)
    most, least = _MINUS_INFINITE, _INFINITE
    for i in range(bits.shape[0]):
        most, least = max(most, _order(bits[i])), min(least, _order(bits[i]))
    if not _MINUS_INFINITE < most < _INFINITE or least < _MINUS_INFINITE:
        return NO_TOKEN
    peak = np.int32(_order(most)).view(np.float32)
    for begin in range(0, values.shape[0], _SPAN):
        end = min(begin + _SPAN, values.shape[0])
        found = np.int32(0)
        for i in range(begin, end):
            found += np.int32(values[i] == peak)
        if found > 0:
            for i in range(begin, end):
                if values[i] == peak:
                    return i
    return NO_TOKEN


@device_function
def _threshold(scaled, peak, top_k, top_p, min_p):  # type: ignore[no-untyped-def]
    """The smallest scaled logit that may be drawn."""
    size = scaled.shape[0]
    threshold = _MINUS_INFINITY
    if 0 < top_k < size:
        threshold = scaled[_likeliest(scaled, peak, top_k)[top_k - 1]]
    if top_p < 1:
        threshold = max(threshold, _nucleus(scaled, peak, threshold, top_p))
    if min_p > 0:
        threshold = max(threshold, peak + np.log(min_p))
    return threshold


@device_function
def _likeliest(values, peak, count):  # type: ignore[no-untyped-def]
    """Where the count largest values are and all that equal the last of them, and maybe a few more: largest
    first, of equal ones the first first.
    """
    places = _places_from(values, _border(values, peak, count))
    return places[np.argsort(-values[places], kind="mergesort")]


@device_function
def _border(values, peak, count):  # type: ignore[no-untyped-def]
    """A value that at least count values reach, and not many more if it can be: lowered until they are
    enough, then raised by halves.
    """
    border, too_high = peak, peak
    reach = np.float32(4)
    for _ in range(_MAX_DOUBLINGS):
        border = peak - reach
        found = _count_from(values, border)
        if found >= count:
            break
        too_high = border
        reach *= np.float32(2)
    else:
        return _MINUS_INFINITY
    for _ in range(_MAX_HALVINGS):
        if found <= 2 * count + _FEW:
            break
        middle = np.float32(0.5) * (border + too_high)
        found_there = _count_from(values, middle)
        if found_there >= count:
            border, found = middle, found_there
        else:
            too_high = middle
    return border


@device_function
def _count_from(values, border):  # type: ignore[no-untyped-def]
    found = np.int32(0)
    for i in range(values.shape[0]):
        found += np.int32(values[i] >= border)
    return found


@device_function
def _places_from(values, border):  # type: ignore[no-untyped-def]
    """Where values are at least border, in order. Spans without any are passed over in vectors."""
    size = values.shape[0]
    places = np.empty(_count_from(values, border), np.int64)
    count = 0
    for begin in range(0, size, _SPAN):
        end = min(begin + _SPAN, size)
        found = np.int32(0)
        for i in range(begin, end):
            found += np.int32(values[i] >= border)
        if found > 0:
            for i in range(begin, end):
                if values[i] >= border:
                    places[count] = i
                    count += 1
    return places


@device_function
def _nucleus(scaled, peak, threshold, top_p):  # type: ignore[no-untyped-def]
    """The smallest logit of the smallest set, among those from threshold on, whose probability reaches top_p.

    Probabilities are added up by distance from the peak, in buckets; only the bucket where the sum reaches
    top_p is sorted.
    """
    size = scaled.shape[0]
    mass_of, bucket_of = np.empty(size, np.float32), np.empty(size, np.int32)
    total = np.float64(0)
    for i in range(size):
        own = fast_exp(scaled[i] - peak) if scaled[i] >= threshold else np.float32(0)
        mass_of[i], bucket_of[i] = own, _bucket(scaled[i], peak)
        total += own
    masses = np.zeros(_BUCKETS + 1, np.float64)
    for i in range(size):
        masses[bucket_of[i]] += mass_of[i]
    mass, bucket = 0.0, 0
    while bucket < _BUCKETS and mass + masses[bucket] < top_p * total:
        mass += masses[bucket]
        bucket += 1
    members = np.empty(size, np.float32)
    count = 0
    for begin in range(0, size, _SPAN):
        end = min(begin + _SPAN, size)
        num_here = np.int32(0)
        for i in range(begin, end):
            num_here += np.int32(bucket_of[i] == bucket)
        if num_here > 0:
            for i in range(begin, end):
                if bucket_of[i] == bucket and scaled[i] >= threshold:
                    members[count] = scaled[i]
                    count += 1
    ordered = np.sort(members[:count])[::-1]
    for k in range(count):
        mass += fast_exp(ordered[k] - peak)
        if mass >= top_p * total:
            return ordered[k]
    return ordered[count - 1] if count > 0 else threshold


@device_function
def _bucket(value, peak):  # type: ignore[no-untyped-def]
    return np.int32(min((peak - value) * np.float32(8), np.float32(_BUCKETS)))


@device_function
def _gumbel_argmax(scaled, peak_at, threshold, seed, position):  # type: ignore[no-untyped-def]
    """argmax of logit + Gumbel noise among the logits from threshold on; the noise is that of
    ops.reference.gumbel_noise.
    """
    state = _mix((seed & _MASK_32) ^ _mix(seed >> np.uint64(32)))
    state = _mix(state ^ _mix(position & _MASK_32))
    at, best = peak_at, scaled[peak_at] + _noise(_bits(state, peak_at))
    if _count_from(scaled, threshold) > _MANY:
        places = _may_win(scaled, threshold, best, state)
    else:
        places = _places_from(scaled, threshold)
    for i in places:
        noisy = scaled[i] + _noise(_bits(state, i))
        if noisy > best:
            at, best = i, noisy
    return at


@device_function
def _may_win(scaled, threshold, best, state):  # type: ignore[no-untyped-def]
    """Where a token from threshold on may beat `best`: only if 1 - uniform < exp(logit - best), which can be
    asked of all in vectors.
    """
    may_win = np.empty(scaled.shape[0], np.float32)
    for i in range(scaled.shape[0]):
        rest = (np.float32(2**23) - np.float32(np.int32(_bits(state, i)))) * np.float32(2.0**-23)
        margin = fast_exp(scaled[i] - best) * np.float32(1.001) - rest
        may_win[i] = margin if scaled[i] >= threshold else np.float32(-1)
    return _places_from(may_win, np.float32(0))


@device_function
def _bits(state, token):  # type: ignore[no-untyped-def]
    """23 random bits of a token."""
    return _mix(state ^ _mix((np.uint64(token) + np.uint64(0x9E3779B9)) & _MASK_32)) >> np.uint64(9)


@device_function
def _noise(bits):  # type: ignore[no-untyped-def]
    uniform = (np.float32(bits) + np.float32(0.5)) * np.float32(2.0**-23)
    return -np.log(-np.log(uniform))


@device_function
def _mix(x):  # type: ignore[no-untyped-def]
    x = ((x ^ (x >> np.uint64(16))) * np.uint64(0x7FEB352D)) & _MASK_32
    x = ((x ^ (x >> np.uint64(15))) * np.uint64(0x846CA68B)) & _MASK_32
    return x ^ (x >> np.uint64(16))


@kernel
def _score(num_rows, logits, ids, logprobs, ranks, top_ids, top_logprobs):  # type: ignore[no-untyped-def]
    count = top_ids.shape[1]
    for row in prange(num_rows):
        values = logits[row]
        at = _argmax_row(values)
        if at < 0:
            # There is no distribution: everything is as unlikely as can be.
            logprobs[row], ranks[row] = _MINUS_INFINITY, 1
            top_ids[row], top_logprobs[row] = np.arange(count), _MINUS_INFINITY
            continue
        peak, own = values[at], values[ids[row]]
        total = np.float32(0)
        better = 0
        for i in range(values.shape[0]):
            total += fast_exp(values[i] - peak)
            better += values[i] > own
        norm = peak + np.log(total)
        logprobs[row], ranks[row] = own - norm, better + 1
        if count > 0:
            places = _likeliest(values, peak, count)
            for k in range(count):
                top_ids[row, k] = places[k]
                top_logprobs[row, k] = values[places[k]] - norm


def score(logits: torch.Tensor, ids: torch.Tensor, num_top: int) -> list[torch.Tensor]:
    """As ops.reference.score."""
    num_rows, count = len(ids), min(num_top, logits.shape[1])
    shapes = (
        ((num_rows,), torch.float32),
        ((num_rows,), torch.int64),
        ((num_rows, count), torch.int64),
        ((num_rows, count), torch.float32),
    )
    results = [torch.empty(shape, dtype=dtype) for shape, dtype in shapes]
    _score(num_rows, logits.numpy(), ids.numpy(), *(result.numpy() for result in results))
    return results
