"""Prints the pinned packages that are missing here, have another version, or have lost files: one
NAME==VERSION per line.

check_packages.py LOCK_FILE [NAME==VERSION ...]; needs nothing but pip's own copy of `packaging`.
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement


def is_whole(requirement: Requirement) -> bool:
    """True if the installed package is the pinned one and all files that were installed with it are there."""
    try:
        package = distribution(requirement.name)
    except PackageNotFoundError:
        return False
    if not requirement.specifier.contains(package.version, prereleases=True):
        return False
    # Compiled Python files come and go by themselves.
    return all(Path(str(file.locate())).exists() for file in package.files or () if file.suffix != ".pyc")


def main() -> None:
    lines = [*Path(sys.argv[1]).read_text().splitlines(), *sys.argv[2:]]
    requirements = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    for requirement in requirements:
        if (requirement.marker is None or requirement.marker.evaluate()) and not is_whole(requirement):
            print(f"{requirement.name}{requirement.specifier}")


if __name__ == "__main__":
    main()
