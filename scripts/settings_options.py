"""The engine's settings as options of a command line, for serve.py and add_model.py."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pagetide.config import make_settings, settings_fields
from triton_server import ROOT


def add_settings(parser: argparse.ArgumentParser) -> None:
    """An option for each setting."""
    settings = parser.add_argument_group("settings of the engine")
    for field in settings_fields():
        flag = f"--{field.name.replace('_', '-')}"
        if field.type is bool:
            settings.add_argument(
                flag, action=argparse.BooleanOptionalAction, default=field.default, help=field.description
            )
        else:
            default = str(ROOT / ".cache") if field.name == "cache_dir" else field.default
            settings.add_argument(
                flag, type=field.type, choices=field.choices or None, default=default, help=field.description
            )


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings, checked before anything starts. Raises SettingsError.

    Relative paths count from here, not from the server's folder.
    """
    values = {field.name: getattr(arguments, field.name) for field in settings_fields()}
    for name in ("model", "lora_dir"):
        if values[name] and Path(values[name]).expanduser().exists():
            values[name] = str(Path(values[name]).expanduser().resolve())
    make_settings(**values)
    return values
