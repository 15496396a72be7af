"""Writes the README's tables of request fields and settings from their definitions.

A test keeps them together.

python scripts/make_docs.py
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "backend_src"))

from pagetide.config import settings_fields
from pagetide.contract.fields import FIELDS

README = Path(__file__).parents[1] / "README.md"


def fields_table() -> str:
    lines = ["| field | type | default | meaning |", "| --- | --- | --- | --- |"]
    for field in FIELDS:
        names = f"`{field.name}`" + "".join(f", `{alias}`" for alias in field.aliases)
        lines.append(
            f"| {names} | {field.dtype}{' list' if field.is_list else ''} | {field.default} | "
            f"{field.sentence} |"
        )
    return "\n".join(lines)


def settings_table() -> str:
    lines = ["| setting | default | meaning |", "| --- | --- | --- |"]
    for field in settings_fields():
        choices = f" ({', '.join(field.choices)})" if field.choices else ""
        lines.append(
            f"| `{field.name}` | {field.default if field.default != '' else ''} | "
            f"{field.description}{choices} |"
        )
    return "\n".join(lines)


def with_tables(text: str) -> str:
    """The README with both tables written anew between their marks."""
    for name, table in (("fields", fields_table()), ("settings", settings_table())):
        text = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)",
            lambda m, table=table: m[1] + table + "\n" + m[2],
            text,
            flags=re.DOTALL,
        )
    return text


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")
