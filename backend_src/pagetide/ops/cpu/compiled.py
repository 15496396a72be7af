"""What all Numba kernels share: how they are compiled, and bfloat16 as the upper half of a float32.

Numba knows no bfloat16: arrays of it come as uint16, and float32 arrays as they are. load() and store()
take both.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import binding as llvm
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic, overload


def _has_openmp() -> bool:
    try:
        ctypes.CDLL("libgomp.so.1.0.0")
    except OSError:
        return False
    return True


# torch's kind of threads, so that both can use one pool (see pagetide/__init__.py); Numba's own where the
# system has no OpenMP runtime.
numba.config.THREADING_LAYER = "omp" if _has_openmp() else "workqueue"


def source_hash() -> str:
    """Of all kernels: Numba looks only at the file of the kernel that is called, not at what is compiled
    into it.
    """
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.blake2b(b"".join(source.read_bytes() for source in sources), digest_size=8).hexdigest()


def _features() -> set[str]:
    """What the processor that kernels are compiled for has; Numba's settings may name an older one."""
    chosen = numba.config.CPU_FEATURES
    if chosen is not None:
        return {feature[1:] for feature in chosen.split(",") if feature.startswith("+")}
    return {feature for feature, is_there in llvm.get_host_cpu_features().items() if is_there}


def _may_use_matrix_tiles() -> bool:
    """Asks Linux for the registers of AMX, which it lends to a whole process for good, if it can."""
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    is_known = platform.system() == "Linux" and platform.machine() == "x86_64"
    return is_known and ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0


HAS_BF16_DOT = "avx512bf16" in _features()
HAS_MATRIX_TILES = HAS_BF16_DOT and {"amx-tile", "amx-bf16"} <= _features() and _may_use_matrix_tiles()
HAS_BYTE_DOT = "avx512vnni" in _features()
HAS_SHORT_DOT = "avx2" in _features()
HAS_WIDE_SHORTS = "avx512bw" in _features()  # 16-bit integers in registers of 64 bytes
VECTOR_BYTES = 64 if "avx512f" in _features() else 32


def _cache_folder() -> str:
    """Where compiled kernels are kept: below NUMBA_CACHE_DIR, beside the sources, or else in the user's own
    cache. Numba tells processors apart, but neither sources nor whether Linux lends registers, so both are
    in the name.
    """
    name = f"kernels-{source_hash()}{'-amx' if HAS_MATRIX_TILES else ''}"
    beside = Path(__file__).parent / "__pycache__"
    folders = [Path(numba.config.CACHE_DIR or beside) / name, Path("~/.cache/pagetide").expanduser() / name]
    return str(next((folder for folder in folders if _is_writable(folder)), folders[0]))


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


numba.config.CACHE_DIR = _cache_folder()

# Sums may be reordered, products and sums fused; but NaN and infinity keep their meaning.
FAST_MATH = {"reassoc", "contract", "arcp", "nsz"}


def kernel(function: Callable[..., Any]) -> Any:
    """A function compiled for all cores, kept on disk, that leaves the interpreter lock alone while it
    runs.
    """
    return numba.njit(
        parallel=True, fastmath=FAST_MATH, nogil=True, cache=True, error_model="numpy", boundscheck=False
    )(function)


def device_function(function: Callable[..., Any]) -> Any:
    """A function for use inside kernels."""
    return numba.njit(fastmath=FAST_MATH, nogil=True, cache=True, error_model="numpy", boundscheck=False)(
        function
    )


def by_form(
    at: int,
    dense: Callable[..., Any],
    rounded: Callable[..., Any],
    halves: Callable[..., Any] | None = None,
) -> Any:
    """A function for use inside kernels, chosen when a kernel is compiled by its argument number `at`, an
    array or a tuple that begins with one: `rounded` for bytes, `halves`, if there is one, for bfloat16, and
    `dense` otherwise.

    All take the same arguments.
    """
    functions = {types.uint8: rounded, types.uint16: halves or dense}

    def chosen(*arguments: Any) -> Any:
        raise NotImplementedError("compiled code only")

    def choose(*kinds: Any) -> Callable[..., Any]:
        kind = kinds[at]
        array = kind.types[0] if isinstance(kind, types.BaseTuple) else kind
        function = functions.get(array.dtype, dense)
        return getattr(function, "py_func", function)

    options: Any = {"fastmath": FAST_MATH, "nogil": True, "error_model": "numpy", "boundscheck": False}
    overload(chosen, jit_options=options, strict=False)(choose)
    return chosen


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
    """Element number `index` of a contiguous float32 or bfloat16 (uint16) array = value; rounds to nearest,
    ties to even.

    A row of an array is a view that counts its references with locked instructions, so kernels give places
    as such numbers.
    """
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


@intrinsic
def borrowed(typing_context, value):  # type: ignore[no-untyped-def]
    """The same arrays (one, or a tuple of tuples of them) without counting references, which locks memory
    whenever a function takes one.

    Whoever gave them keeps them alive.
    """

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return _without_owner(context, builder, value, args[0])

    return value(value), generate


def _without_owner(context: Any, builder: ir.IRBuilder, kind: Any, value: ir.Value) -> ir.Value:
    if isinstance(kind, types.Array):
        array = context.make_array(kind)(context, builder, value)
        array.meminfo = ir.Constant(array.meminfo.type, None)
        array.parent = ir.Constant(array.parent.type, None)
        return array._getvalue()
    if isinstance(kind, types.BaseTuple):
        parts = [
            _without_owner(context, builder, part, builder.extract_value(value, i))
            for i, part in enumerate(kind.types)
        ]
        return context.make_tuple(builder, kind, parts)
    return value


@intrinsic
def _float_of_bits(typing_context, bits):  # type: ignore[no-untyped-def]
    """The float32 with these bits (int32)."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), generate


@device_function
def fast_exp(x):  # type: ignore[no-untyped-def]
    """exp of a float32, relative error below 3e-7, in operations that the compiler can vectorize; below -87
    it is 0.

    exp(x) = 2^n * exp(r) with n the nearest integer to x / ln 2 and |r| <= ln 2 / 2 (the range reduction of
    Cephes' expf).
    """
    clamped = min(max(x, np.float32(-87.0)), np.float32(88.0))
    n = np.floor(clamped * np.float32(1.44269504) + np.float32(0.5))
    r = (clamped - n * np.float32(0.693359375)) + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    power = _float_of_bits(np.int32(np.int32(n) + np.int32(127)) << np.int32(23))
    result = (p * r * r + r + np.float32(1)) * power
    return np.float32(0) if x < np.float32(-87.0) else result


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's memory as Numba takes it: bfloat16 as uint16."""
    return tensor.view(torch.uint16).numpy() if tensor.dtype is torch.bfloat16 else tensor.numpy()


def as_tensor(array: np.ndarray) -> torch.Tensor:
    """The tensor that as_numpy was given: uint16 as bfloat16."""
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if array.dtype == np.uint16 else tensor
