"""Converts models in a process of its own: what it loads for that (torch, all weights) goes when it ends.

python -m pagetide.models.convert gguf FILE FOLDER         a GGUF file to a model directory
python -m pagetide.models.convert tokenizer MODEL FOLDER   a tokenizer's older files to tokenizer.json
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pagetide
from pagetide.models.config import UnsupportedModelError

# How the parent finds the last word of a child among what libraries print.
_REFUSED, _FAILED = "pagetide-refused: ", "pagetide-failed: "


def convert(kind: str, source: Path, target: Path, *more: Path) -> None:
    """Fills the folder target; kind: gguf, tokenizer or codes (of which target is the file). Raises
    UnsupportedModelError, or OSError where there is no room.
    """
    package = str(Path(pagetide.__file__).parents[1])
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "pagetide.models.convert", kind, *map(str, (source, target, *more))]
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    if done.returncode == 0:
        return
    last = (done.stdout.splitlines() or [f"the conversion ended with code {done.returncode}"])[-1]
    if last.startswith(_REFUSED):
        raise UnsupportedModelError(last.removeprefix(_REFUSED))
    raise OSError(last.removeprefix(_FAILED))


def convert_tokenizer(model: Path, target: Path) -> None:
    """Writes tokenizer.json, made from the older files of a model directory. Raises UnsupportedModelError."""
    from transformers import AutoTokenizer  # imports torch

    try:
        AutoTokenizer.from_pretrained(str(model)).save_pretrained(str(target))
    except Exception as error:
        raise UnsupportedModelError(str(error)) from error
    if not (target / "tokenizer.json").exists():
        raise UnsupportedModelError("transformers writes none for it")


def main() -> int:
    kind, source, target = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    try:
        if kind == "gguf":
            from pagetide.models.gguf import convert_gguf  # imports torch

            convert_gguf(source, target)
        elif kind == "codes":
            from pagetide.models.gguf_codes import convert_codes

            convert_codes(source, Path(sys.argv[4]), target)
        else:
            convert_tokenizer(source, target)
    except UnsupportedModelError as error:
        print(f"{_REFUSED}{error}".replace("\n", " "), flush=True)
        return 1
    except OSError as error:
        print(f"{_FAILED}{error}".replace("\n", " "), flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
