"""Which of several ways to the same product is fastest: measured once for a kind of GPU, and kept."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
import triton

from pagetide.folders import write_whole
from pagetide.ops.gpu.few_rows import version

log = logging.getLogger("pagetide.ops")
Way = Callable[[torch.Tensor], torch.Tensor]
_MOST_DIFFERENT = 0.06  # of a result's size: more than rounding to FP8 costs, less than a wrong kernel would


class Choices:
    """file: of what was chosen before. time: how long a call takes on the device; without it nothing is
    measured.
    """

    def __init__(
        self, file: Path | None = None, time: Callable[[Callable[[], torch.Tensor]], float] | None = None
    ):
        self._file, self._time = file, time
        self._chosen = _read(file) if file else {}

    def fastest(
        self, key: str, ways: Mapping[str, Way], unmeasured: str, make_x: Callable[[], torch.Tensor]
    ) -> Way:
        """One of the ways, for what make_x() is like; `unmeasured` where nothing is measured. A way that
        fails, or that says something other than the first does, is not taken, and the log says so.
        """
        if self._time is None or len(ways) == 1:
            return ways[unmeasured]
        if self._chosen.get(key) not in ways:
            self._chosen[key] = self._measured(key, ways, make_x())
            self._keep()
        return ways[self._chosen[key]]

    def _measured(self, key: str, ways: Mapping[str, Way], x: torch.Tensor) -> str:
        assert self._time is not None
        first, *others = ways
        expected = ways[first](x).float()
        right = [first, *(name for name in others if _is_right(key, name, ways[name], x, expected))]
        times = {name: self._time(partial(ways[name], x)) for name in right}
        log.info("%s: %s", key, ", ".join(f"{name} {taken:.4f} ms" for name, taken in times.items()))
        return min(times, key=times.__getitem__)

    def _keep(self) -> None:
        if self._file:
            try:
                self._file.parent.mkdir(parents=True, exist_ok=True)
                write_whole(self._file, json.dumps({**_read(self._file), **self._chosen}, indent=1))
            except OSError as error:
                log.warning("what was measured is not kept: %s", error)
                self._file = None


def _is_right(key: str, name: str, way: Way, x: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether a way says what is expected, as nearly as it must."""
    try:
        found = way(x).float()
    except Exception as error:  # whatever a compiler or a driver raises
        log.warning("%s: %s is not taken, since it fails: %s", key, name, error)
        return False
    difference, size = float((found - expected).norm()), float(expected.norm())
    if difference <= _MOST_DIFFERENT * size:
        return True
    log.warning("%s: %s is not taken, since it is %.3g of %.3g off", key, name, difference, size)
    return False


def _read(file: Path) -> dict[str, str]:
    """Nothing where there is no such file, or none that this wrote: it is measured again."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def measured_choices(cache: Path, device: torch.device) -> Choices:
    """Measures on a GPU, the level-2 cache emptied before each call, and keeps it below this folder.
    Elsewhere measures nothing.
    """
    if device.type != "cuda":
        return Choices()
    name = "-".join(torch.cuda.get_device_name(device).split())
    file = cache / "products" / f"{name}-torch{torch.__version__}-{version()}.json"
    return Choices(file, lambda call: float(triton.testing.do_bench(call, warmup=5, rep=20)))
