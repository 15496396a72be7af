"""Sampling one row per thread: the rules of ops/reference.py, without sorting the vocabulary.

A row is read from memory once, for the largest logit of each span of 64. All that is asked afterwards passes
over the spans whose largest logit says that nothing is to be found there. The token of the largest sum of
logit and noise is drawn before top-p is looked at: most often that allows it; if not, the tokens that are at
most as likely are ruled out too, and the draw is repeated (as in ops/gpu/sampling.py).
"""

from __future__ import annotations

import numpy as np
import torch
from numba import prange

from pagetide.ops.cpu.compiled import device_function, kernel
from pagetide.ops.cpu.spans import at_least, can_win, first_bit, largest_order, masses, num_bits

NO_TOKEN = -1  # runner/plan.py's: no logit is finite
_MASK_32 = np.uint64(0xFFFFFFFF)
_INFINITY = np.float32(np.inf)
_MINUS_INFINITY = np.float32(-np.inf)
_MAX_DOUBLINGS = 20  # of the reach below the peak; what is a million nats less likely is looked for among all
_MAX_HALVINGS = 12  # of the room in which a border is looked for
_FEW = 64  # values that may be sorted without having been asked for
_SPAN = 64  # values that are looked at together
_MAX_NOISE = np.float32(16.64)  # of the largest 23 random bits: a little more than ln(2 ** 24)


@kernel
def _argmax(num_rows, logits, out):  # type: ignore[no-untyped-def]
    for row in prange(num_rows):
        _, out[row] = _survey(logits[row])


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """Likeliest token of each row: logits [s, vocabulary] float32 -> [s] int64."""
    out = torch.empty(logits.shape[0], dtype=torch.int64)
    _argmax(len(out), _rows_of(logits), out.numpy())
    return out


def _rows_of(logits: torch.Tensor) -> np.ndarray:
    """As ops/cpu/spans.py takes them: each row one piece of memory."""
    assert logits.stride(-1) == 1 or logits.shape[-1] <= 1, logits.stride()
    return logits.numpy()


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
    _sample(len(out), _rows_of(logits), *(values.numpy() for values in rows), out.numpy())
    return out


@kernel
def _sample(num_rows, logits, temperature, top_k, top_p, min_p, seed, position, out):  # type: ignore[no-untyped-def]
    for row in prange(num_rows):
        values = logits[row]
        peaks, at = _survey(values)
        if at >= 0 and temperature[row] > 0:
            state = _state(np.uint64(seed[row]), np.uint64(position[row]))
            at = _sample_row(values, peaks, at, temperature[row], top_k[row], top_p[row], min_p[row], state)
        out[row] = at


@device_function
def _sample_row(values, peaks, at, temperature, top_k, top_p, min_p, state):  # type: ignore[no-untyped-def]
    """at: where the largest logit is."""
    rate = np.float32(1) / temperature
    highest = values[at] * rate
    if not np.isfinite(highest):
        return at  # the others are infinitely less likely
    lowest = _MINUS_INFINITY  # scaled logit that top-k allows
    if 0 < top_k < values.shape[0]:
        lowest = _kth(values, peaks, values[at], top_k) * rate
    floor = lowest
    if min_p > 0:
        floor = max(floor, highest + np.log(min_p))
    drawn = _draw(values, peaks, at, rate, floor, state)
    wanted = -1.0  # not known yet
    while top_p < 1 and values[drawn] * rate < highest:
        # It stays if those that are likelier have less than top_p of the mass. Most often they have less
        # than that of theirs and its own, for which few spans are looked at.
        scaled = values[drawn] * rate
        mass, mass_above = _masses(values, peaks, rate, highest, scaled, scaled)
        if mass_above < top_p * mass:
            break
        if wanted < 0:
            wanted = top_p * _masses(values, peaks, rate, highest, lowest, highest)[0]
        if mass_above < wanted:
            break
        drawn = _draw(values, peaks, at, rate, np.nextafter(scaled, _INFINITY), state)
    return drawn


@device_function
def _survey(values):  # type: ignore[no-untyped-def]
    """(the largest value of each span, where the first of the largest of all is). NO_TOKEN if that is not
    finite, or some value is no number: nothing can be said of such a row.
    """
    size = values.shape[0]
    orders = np.empty((size + _SPAN - 1) // _SPAN, np.int32)
    for span in range(orders.shape[0]):
        orders[span] = largest_order(values, span * _SPAN, min(_SPAN, size - span * _SPAN))
    most = np.int32(-0x80000000)
    for span in range(orders.shape[0]):
        most = max(most, orders[span])
        # The same once more leads back from the order to the bits.
        orders[span] ^= orders[span] >> np.int32(31) & np.int32(0x7FFFFFFF)
    peaks = orders.view(np.float32)
    if not np.int32(-0x7F800001) < most < np.int32(0x7F800000):
        return peaks, NO_TOKEN
    peak = peaks.max()
    for span in range(peaks.shape[0]):
        if peaks[span] == peak:
            for i in range(span * _SPAN, size):
                if values[i] == peak:
                    return peaks, i
    return peaks, NO_TOKEN


@device_function
def _kth(values, peaks, peak, count):  # type: ignore[no-untyped-def]
    """The count-th largest value."""
    candidates = values[_candidates(values, peaks, peak, count)]
    return np.partition(candidates, candidates.shape[0] - count)[candidates.shape[0] - count]


@device_function
def _likeliest(values, peaks, peak, count):  # type: ignore[no-untyped-def]
    """Where the count largest values are and all that equal the last of them, and maybe a few more: largest
    first, of equal ones the first first.
    """
    places = _candidates(values, peaks, peak, count)
    return places[np.argsort(-values[places], kind="mergesort")]


@device_function
def _candidates(values, peaks, peak, count):  # type: ignore[no-untyped-def]
    """Where the count largest values are and all that equal the last of them, and others: in order."""
    if count > peaks.shape[0]:
        return _places_from(values, peaks, _border(values, peak, count))
    # As many spans have a value of at least this.
    places = _places_from(values, peaks, _border(peaks, peak, count))
    if places.shape[0] > 2 * count + _FEW:
        found = values[places]
        places = places[found >= _border(found, peak, count)]
    return places


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
def _num_from(values, peaks, border):  # type: ignore[no-untyped-def]
    """How many values are at least border."""
    size, count = values.shape[0], 0
    for span in range(peaks.shape[0]):
        if peaks[span] >= border:
            count += num_bits(at_least(values, span * _SPAN, min(_SPAN, size - span * _SPAN), border))
    return count


@device_function
def _places_from(values, peaks, border):  # type: ignore[no-untyped-def]
    """Where values are at least border, in order."""
    size, count = values.shape[0], 0
    places = np.empty(_num_from(values, peaks, border), np.int64)
    for span in range(peaks.shape[0]):
        if peaks[span] >= border:
            begin = span * _SPAN
            left = at_least(values, begin, min(_SPAN, size - begin), border)
            while left:
                places[count] = begin + first_bit(left)
                count += 1
                left &= left - np.uint64(1)
    return places


@device_function
def _masses(values, peaks, rate, highest, floor, border):  # type: ignore[no-untyped-def]
    """The sums of exp(scaled - highest) over the scaled values from floor on, and over those beyond border,
    which is at least floor.
    """
    size = values.shape[0]
    mass, mass_above = 0.0, 0.0
    for span in range(peaks.shape[0]):
        if peaks[span] * rate < floor:
            continue
        begin = span * _SPAN
        here, above = masses(values, begin, min(_SPAN, size - begin), rate, highest, floor, border)
        mass += here
        mass_above += above
    return mass, mass_above


@device_function
def _draw(values, peaks, at, rate, floor, state):  # type: ignore[no-untyped-def]
    """argmax of scaled logit + Gumbel noise among the scaled logits from floor on; the noise is that of
    ops.reference.gumbel_noise. at: where the largest logit is.
    """
    size = values.shape[0]
    best = values[at] * rate + _noise(_bits(state, at))
    for span in range(peaks.shape[0]):
        if peaks[span] * rate < floor or peaks[span] * rate + _MAX_NOISE < best:
            continue
        begin = span * _SPAN
        left = can_win(values, begin, min(_SPAN, size - begin), rate, floor, best, state)
        while left:
            i = begin + first_bit(left)
            noisy = values[i] * rate + _noise(_bits(state, i))
            if noisy > best:
                at, best = i, noisy
            left &= left - np.uint64(1)
    return at


@device_function
def _state(seed, position):  # type: ignore[no-untyped-def]
    """What a row's random bits are made of."""
    state = _mix(np.uint32(seed & _MASK_32) ^ _mix(np.uint32(seed >> np.uint64(32))))
    return _mix(state ^ _mix(np.uint32(position & _MASK_32)))


@device_function
def _bits(state, token):  # type: ignore[no-untyped-def]
    """23 random bits of a token."""
    return np.uint32(_mix(state ^ _mix(np.uint32(np.uint32(token) + np.uint32(0x9E3779B9)))) >> np.uint32(9))


@device_function
def _noise(bits):  # type: ignore[no-untyped-def]
    uniform = (np.float32(bits) + np.float32(0.5)) * np.float32(2.0**-23)
    return -np.log(-np.log(uniform))


@device_function
def _mix(x):  # type: ignore[no-untyped-def]
    """Each product and sum made 32 bits again at once, so that the vectors' lanes are not wider."""
    x = np.uint32(np.uint32(x ^ np.uint32(x >> np.uint32(16))) * np.uint32(0x7FEB352D))
    x = np.uint32(np.uint32(x ^ np.uint32(x >> np.uint32(15))) * np.uint32(0x846CA68B))
    return np.uint32(x ^ np.uint32(x >> np.uint32(16)))


@kernel
def _score(num_rows, logits, ids, logprobs, ranks, top_ids, top_logprobs):  # type: ignore[no-untyped-def]
    count = top_ids.shape[1]
    for row in prange(num_rows):
        values = logits[row]
        peaks, at = _survey(values)
        if at < 0:
            # There is no distribution: everything is as unlikely as can be.
            logprobs[row], ranks[row] = _MINUS_INFINITY, 1
            top_ids[row], top_logprobs[row] = np.arange(count), _MINUS_INFINITY
            continue
        peak, own = values[at], values[ids[row]]
        total, _ = _masses(values, peaks, np.float32(1), peak, _MINUS_INFINITY, peak)
        better = _num_from(values, peaks, np.nextafter(own, _INFINITY))
        norm = peak + np.log(total)
        logprobs[row], ranks[row] = own - norm, better + 1
        if count > 0:
            places = _likeliest(values, peaks, peak, count)
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
    _score(num_rows, _rows_of(logits), ids.numpy(), *(result.numpy() for result in results))
    return results
