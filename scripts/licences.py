"""Writes docker/licences.md: the packages of the lock file, with the licences that they name.

python scripts/licences.py
"""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docker" / "licences.md"
HEAD = """# Licences of what is installed

Written by `scripts/licences.py` from the metadata of the packages in `requirements.lock`; one that was not
installed on the machine that wrote this is marked so. Pagetide itself is Apache-2.0, Triton BSD-3.

| package | version | licence |
| --- | --- | --- |
"""


def locked() -> dict[str, str]:
    """Versions by name; the newest where there are several."""
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    return dict(
        re.match(r"([\w.-]+)==([\w.+-]+)", line).groups() for line in lines if re.match(r"[\w.-]+==", line)
    )


def licence_of(name: str) -> str:
    """As its metadata says it. Raises PackageNotFoundError."""
    about = metadata.metadata(name)
    classes = [c.split(" :: ")[-1] for c in about.get_all("Classifier", []) if c.startswith("License ::")]
    text = (about.get("License") or "").strip().splitlines()
    return about.get("License-Expression") or ", ".join(classes) or (text[0] if text else "not named")


def rows() -> dict[str, str]:
    before = (
        dict(re.findall(r"^\| ([\w.-]+) \|.*\| (.+) \|$", PAGE.read_text(), re.M)) if PAGE.exists() else {}
    )
    found = {}
    for name in locked():
        try:
            found[name] = licence_of(name)
        except metadata.PackageNotFoundError:
            found[name] = before.get(name, "not installed here")
    return found


def main() -> int:
    versions = locked()
    lines = [f"| {name} | {versions[name]} | {licence} |" for name, licence in sorted(rows().items())]
    PAGE.write_text(HEAD + "\n".join(lines) + "\n")
    print(f"{len(lines)} packages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
