"""Writes what the READMEs list from where it is defined: request fields, outputs and settings in
model_repository/, the files of backend_src/, clients/, scripts/ and tests/ with what each is for.

A test keeps them together.

python scripts/make_docs.py
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "backend_src"))

from pagetide.config import settings_fields
from pagetide.contract.fields import FIELDS
from pagetide.contract.outputs import OUTPUTS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "backend_src" / "pagetide"
PAGES = tuple(
    ROOT / folder / "README.md"
    for folder in ("model_repository", "backend_src", "clients", "scripts", "tests")
)
# From above: each imports only what is below it.
LAYERS = (
    "gateway", "serving", "engine", "runner", "models", "ops", "ops/cpu", "kv_cache", "contract", "text"
)  # fmt: skip


def fields_table() -> str:
    lines = ["| field | type | default | meaning |", "| --- | --- | --- | --- |"]
    for field in FIELDS:
        names = f"`{field.name}`" + "".join(f", `{alias}`" for alias in field.aliases)
        lines.append(
            f"| {names} | {field.dtype}{' list' if field.is_list else ''} | {field.default} | "
            f"{field.sentence} |"
        )
    return "\n".join(lines)


def outputs_table() -> str:
    lines = ["| output | type | shape | asked for by | meaning |", "| --- | --- | --- | --- | --- |"]
    for output in OUTPUTS:
        asked_by = f"`{output.asked_by}`" if output.asked_by else "always there"
        lines.append(
            f"| `{output.name}` | {output.dtype} | [{output.dims}] | {asked_by} | {output.sentence} |"
        )
    return "\n".join(lines)


def settings_table() -> str:
    lines = ["| setting | default | meaning |", "| --- | --- | --- |"]
    for field in settings_fields():
        choices = f" ({', '.join(field.choices)})" if field.choices else ""
        lines.append(f"| `{field.name}` | {field.default} | {field.description}{choices} |")
    return "\n".join(lines)


def purpose(file: Path) -> str:
    """The first sentence of a Python file's docstring, or of a shell script's comment, in one line.

    Raises ValueError where there is none.
    """
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".sh":
        comment = re.match(r"#!.*\n# (.+)", text)
        words = comment[1] if comment else None
    else:
        words = ast.get_docstring(ast.parse(text))
    if not words:
        raise ValueError(f"{file} does not say in its first lines what it is for")
    return re.split(r"(?<=\.)\s", words.replace("\n", " "))[0]


def files_table(files: Iterable[Path], base: Path) -> str:
    lines = ["| file | what it is for |", "| --- | --- |"]
    lines += [f"| `{file.relative_to(base)}` | {purpose(file)} |" for file in files]
    return "\n".join(lines)


def package_files() -> list[Path]:
    """Folder by folder, those of the upper layers first."""
    return [
        file
        for folder in ("", *LAYERS)
        for file in sorted((PACKAGE / folder).glob("*.py"))
        if file.name != "__init__.py"
    ]


def scripts() -> list[Path]:
    return sorted(file for file in (ROOT / "scripts").iterdir() if file.suffix in (".py", ".sh"))


def lists() -> dict[str, str]:
    """What stands between the marks of each name."""
    return {
        "fields": fields_table(),
        "outputs": outputs_table(),
        "settings": settings_table(),
        "package": files_table(package_files(), PACKAGE),
        "clients": files_table(
            sorted([*(ROOT / "clients").glob("*.py"), *(ROOT / "clients").glob("*/__init__.py")]),
            ROOT / "clients",
        ),
        "scripts": files_table(scripts(), ROOT / "scripts"),
        "tests": files_table(sorted((ROOT / "tests").glob("*/test_*.py")), ROOT / "tests"),
    }


def with_lists(text: str) -> str:
    """The page with its lists written anew between their marks."""
    for name, table in lists().items():
        text = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)",
            lambda m, table=table: m[1] + table + "\n" + m[2],
            text,
            flags=re.DOTALL,
        )
    return text


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(with_lists(page.read_text(encoding="utf-8")), encoding="utf-8")
