"""Packed weights, kept on disk and mapped into memory: packing costs a start seconds, and weights that are
read from the checkpoint and packed are in memory twice.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

import numpy as np

from pagetide.folders import UNFINISHED, make_once
from pagetide.ops.cpu.compiled import source_hash

log = logging.getLogger("pagetide.kept")

_WHOLE = "complete"  # the file that is written last

Arrays = Mapping[str, np.ndarray]
# Arrays by name, from where they are kept, or made if they are not.
Keeper = Callable[[str, Callable[[], Arrays]], Arrays]


def no_keeper(name: str, make: Callable[[], Arrays]) -> Arrays:
    """Makes them each time."""
    return make()


def keeper(model: Path, place: Path | None, form: str) -> Keeper:
    """Keeps a model's arrays of this form (type and quantization) in this place; without one, they are made
    each time.
    """
    if place is None:
        return no_keeper
    # Whatever decides what is packed: the model's files, and the code that reads and packs them.
    files = [file.stat() for file in sorted(model.glob("*.safetensors"))]
    facts = [form, *((file.st_size, file.st_mtime_ns) for file in files)]
    package = Path(__file__).parents[2]
    code = [package / "ops" / "weights.py", *sorted(package.glob("models/*.py"))]
    texts = [
        file.read_bytes()
        for file in (model / "config.json", model / "tokenizer.json", *code)
        if file.exists()
    ]
    key = hashlib.blake2b(f"{source_hash()} {facts}".encode() + b"".join(texts), digest_size=6).hexdigest()
    return partial(_kept, place, f"{form}-{key}")


def _kept(place: Path, key: str, name: str, make: Callable[[], Arrays]) -> Arrays:
    target = place / f"packed-{name}-{key}"
    made: list[Arrays] = []

    def write(folder: Path) -> None:
        made.append(make())  # which may read a checkpoint, and does so once
        for array_name, array in made[0].items():
            np.save(folder / f"{array_name}.npy", array)  # begins at a whole cache line
        (folder / _WHOLE).touch()

    try:
        folder = make_once(target, write, _is_whole)
        arrays = {file.stem: np.asarray(np.load(file, mmap_mode="c")) for file in folder.glob("*.npy")}
        if _is_whole(folder):  # a start of other code may just have removed it
            _remove_others(target, place.glob(f"packed-{name}-{key.partition('-')[0]}-*"))
            return arrays
    except (OSError, ValueError, EOFError) as error:  # no room, or files that a power cut has left torn
        log.warning("packed weights are not kept: %s", error)
    return made[0] if made else make()


def _is_whole(folder: Path) -> bool:
    return (folder / _WHOLE).exists()


def _remove_others(target: Path, folders: Iterable[Path]) -> None:
    """Those of older files or code. What another process is making has no mark yet, and stays."""
    for folder in folders:
        if folder != target and _is_whole(folder) and folder.suffix != UNFINISHED:
            (folder / _WHOLE).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
