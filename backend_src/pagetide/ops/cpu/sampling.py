"""Sampling one row per thread: the rules of ops/reference.py, without sorting the vocabulary."""

from __future__ import annotations

import numpy as np
import torch
from numba import prange

from pagetide.ops.cpu.compiled import device_function, kernel

_MASK_32 = np.uint64(0xFFFFFFFF)
_MINUS_INFINITY = np.float32(-np.inf)


@kernel
def _argmax(num_rows, logits, out):  # type: ignore[no-untyped-def]
    for row in prange(num_rows):
        out[row] = _argmax_row(logits[row])


def argmax(logits: torch.Tensor) -> torch.Tensor:
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
        if temperature[row] == 0:
            out[row] = _argmax_row(values)
        else:
            scaled = values / temperature[row]
            threshold = _threshold(scaled, top_k[row], top_p[row], min_p[row])
            out[row] = _gumbel_argmax(scaled, threshold, np.uint64(seed[row]), np.uint64(position[row]))


@device_function
def _argmax_row(values):  # type: ignore[no-untyped-def]
    # The largest value first, in a loop that the compiler can vectorize; its place second.
    peak = _MINUS_INFINITY
    for i in range(values.shape[0]):
        peak = max(peak, values[i])
    for i in range(values.shape[0]):
        if values[i] == peak:
            return i
    return 0


@device_function
def _threshold(scaled, top_k, top_p, min_p):  # type: ignore[no-untyped-def]
    """The smallest scaled logit that may be drawn."""
    size = scaled.shape[0]
    peak = _MINUS_INFINITY
    for i in range(size):
        peak = max(peak, scaled[i])
    threshold = _MINUS_INFINITY
    if 0 < top_k < size:
        threshold = np.partition(scaled, size - top_k)[size - top_k]
    if top_p < 1:
        threshold = max(threshold, _nucleus(scaled, peak, threshold, top_p))
    if min_p > 0:
        threshold = max(threshold, peak + np.log(min_p))
    return threshold


@device_function
def _nucleus(scaled, peak, threshold, top_p):  # type: ignore[no-untyped-def]
    """The smallest logit of the smallest set, among those from threshold on, whose probability reaches top_p."""
    total = 0.0
    for i in range(scaled.shape[0]):
        if scaled[i] >= threshold:
            total += np.exp(scaled[i] - peak)
    # The likeliest tokens almost always suffice: sort those above a border, and lower the border until their mass does.
    reach = np.float32(4)
    while True:
        border = max(peak - reach, threshold)
        ordered = np.sort(scaled[scaled >= border])[::-1]
        mass = 0.0
        for i in range(ordered.shape[0]):
            mass += np.exp(ordered[i] - peak)
            if mass >= top_p * total:
                return ordered[i]
        if border == threshold or ordered.shape[0] == scaled.shape[0]:
            return ordered[-1]
        reach *= 2


@device_function
def _gumbel_argmax(scaled, threshold, seed, position):  # type: ignore[no-untyped-def]
    """argmax of logit + Gumbel noise among the logits from threshold on; the noise is that of ops.reference.gumbel_noise."""
    state = _mix((seed & _MASK_32) ^ _mix(seed >> np.uint64(32)))
    state = _mix(state ^ _mix(position & _MASK_32))
    best, at = _MINUS_INFINITY, 0
    for i in range(scaled.shape[0]):
        if scaled[i] >= threshold:
            bits = _mix(state ^ _mix((np.uint64(i) + np.uint64(0x9E3779B9)) & _MASK_32))
            uniform = (np.float32(bits >> np.uint64(8)) + np.float32(0.5)) * np.float32(2.0**-24)
            noisy = scaled[i] - np.log(-np.log(uniform))
            if noisy > best:
                best, at = noisy, i
    return at


@device_function
def _mix(x):  # type: ignore[no-untyped-def]
    x = ((x ^ (x >> np.uint64(16))) * np.uint64(0x7FEB352D)) & _MASK_32
    x = ((x ^ (x >> np.uint64(15))) * np.uint64(0x846CA68B)) & _MASK_32
    return x ^ (x >> np.uint64(16))
