"""A response that does not fit into shared memory is an error before it is tried."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from pagetide.serving.shared_memory import check_room
from pagetide.types import EngineError


@pytest.mark.parametrize(
    "array", [np.zeros(3 * 2**20, np.float32), np.array([b"x" * 2**20] * 12, np.object_).reshape(3, 4)]
)
def test_a_response_larger_than_what_is_free_is_an_error_that_says_so(monkeypatch, array):
    for free, fits in ((12 * 2**20, False), (20 * 2**20, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda folder, free=free: SimpleNamespace(free=free))
        if fits:
            check_room([array])
        else:
            with pytest.raises(EngineError, match="the response has 12 MB and /dev/shm has room for 12 MB"):
                check_room([array])


def test_small_responses_are_always_tried(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=0))
    check_room([np.zeros(10), np.array([b"abc"], np.object_)])
