"""What all Numba kernels share: how they are compiled, and bfloat16 as the upper half of a float32.

Numba knows no bfloat16: arrays of it come as uint16, and float32 arrays as they are. load() and store() take both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

# torch brings the OpenMP runtime and is imported above: both then use one pool of threads instead of two that spin against each other.
numba.config.THREADING_LAYER = "omp"

# Sums may be reordered, products and sums fused; but NaN and infinity keep their meaning.
FAST_MATH = {"reassoc", "contract", "arcp", "nsz"}


def kernel(function: Callable[..., Any]) -> Any:
    """A function compiled for all cores, kept on disk, that leaves the interpreter lock alone while it runs."""
    return numba.njit(parallel=True, fastmath=FAST_MATH, nogil=True, cache=True, error_model="numpy", boundscheck=False)(function)


def device_function(function: Callable[..., Any]) -> Any:
    """A function for use inside kernels."""
    return numba.njit(fastmath=FAST_MATH, nogil=True, cache=True, error_model="numpy", boundscheck=False)(function)


@intrinsic
def load(typing_context, value):  # type: ignore[no-untyped-def]
    """A float32 or bfloat16 (uint16) element as float32."""
    if value == types.float32:
        return types.float32(value), lambda context, builder, signature, args: args[0]

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        wide = builder.zext(args[0], ir.IntType(32))
        return builder.bitcast(builder.shl(wide, ir.Constant(ir.IntType(32), 16)), ir.FloatType())

    return types.float32(types.uint16), generate


@intrinsic
def store(typing_context, array, index, value):  # type: ignore[no-untyped-def]
    """array[index] = value for a one-dimensional float32 or bfloat16 (uint16) array; rounds to nearest, ties to even."""
    is_wide = array.dtype == types.float32

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        element = args[2]
        if not is_wide:
            word = ir.IntType(32)
            bits = builder.bitcast(element, word)
            odd = builder.and_(builder.lshr(bits, ir.Constant(word, 16)), ir.Constant(word, 1))
            rounded = builder.add(builder.add(bits, ir.Constant(word, 0x7FFF)), odd)
            element = builder.trunc(builder.lshr(rounded, ir.Constant(word, 16)), ir.IntType(16))
        data = context.make_array(array)(context, builder, args[0]).data
        builder.store(element, builder.gep(data, [args[1]]))
        return context.get_dummy_value()

    return types.none(array, types.intp, types.float32), generate


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's memory as Numba takes it: bfloat16 as uint16."""
    return tensor.view(torch.uint16).numpy() if tensor.dtype is torch.bfloat16 else tensor.numpy()
