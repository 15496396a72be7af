"""Whether a response fits into the memory that Triton's stubs share with the server."""

from __future__ import annotations

import shutil
from collections.abc import Iterable

import numpy as np

from pagetide.types import EngineError

_FOLDER = "/dev/shm"
_LARGE = 2**20  # smaller responses are not looked at, and as much is left free


def check_room(arrays: Iterable[np.ndarray], folder: str = _FOLDER) -> None:
    """Raises EngineError if Triton's stub would find no room for the arrays (bytes objects, or numbers) in
    shared memory.

    Once the stub has tried to send a last response, nothing can be sent in its place, and the client would
    wait for ever.
    """
    size = sum(sum(map(len, array.flat)) if array.dtype == np.object_ else array.nbytes for array in arrays)
    if size <= _LARGE:
        return
    free = shutil.disk_usage(folder).free
    if size + _LARGE > free:
        raise EngineError(
            f"the response has {size / 2**20:.0f} MB and {folder} has room for {free / 2**20:.0f} "
            "MB; ask for fewer logits, "
            "log-probabilities or tokens, or give the server more shared memory"
        )
