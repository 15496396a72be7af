"""Puts another model beside those of a model repository: an ensemble of its name with an engine, settings and
metrics of its own.

python scripts/add_model.py NAME --model X [settings of the engine]
python scripts/add_model.py NAME --remove

NAME takes the place of `ensemble`, NAME_unary that of `ensemble_unary`, NAME_llm that of `llm`, and so on;
the settings are in pagetide-NAME.json beside the models. The OpenAI gateway serves it as the model NAME.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "backend_src"))

from make_model_configs import configs
from pagetide.config import SettingsError, settings_file
from settings_options import add_settings, settings_of
from triton_server import REPOSITORY

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]{0,39}")
_FIRST = "ensemble"


def folder_of(name: str, base: str) -> str:
    """The added model's folder that does what the folder `base` does."""
    return name if base == _FIRST else f"{name}_{base.removeprefix(f'{_FIRST}_')}"


def config_of(name: str, base: str, text: str) -> str:
    """config.pbtxt of such a folder, from that of `base`."""
    text = re.sub(r'model_name: "(\w+)"', rf'model_name: "{name}_\1"', text)
    if 'backend: "python"' in text:
        text = text.replace(f'name: "{base}"', f'name: "{folder_of(name, base)}"', 1)
        text += f'parameters [ {{ key: "engine" value: {{ string_value: "{name}" }} }} ]\n'
    return text


def add(repository: Path, name: str, settings: dict[str, object]) -> list[str]:
    """Writes the folders and the settings; returns the folders' names."""
    for base, text in configs().items():
        folder = repository / folder_of(name, base)
        folder.mkdir(parents=True)
        (folder / "config.pbtxt").write_text(config_of(name, base, text))
        (folder / "1").symlink_to(Path("..") / base / "1")  # the same code, wherever the repository lies
    (repository / settings_file(name)).write_text(json.dumps(settings, indent=2) + "\n")
    return [folder_of(name, base) for base in configs()]


def remove(repository: Path, name: str) -> None:
    """Removes what add() has written."""
    for base in configs():
        shutil.rmtree(repository / folder_of(name, base), ignore_errors=True)
    (repository / settings_file(name)).unlink(missing_ok=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="add_model.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", help="letters, digits, dots and hyphens")
    parser.add_argument("--repository", type=Path, default=REPOSITORY, help="the model repository")
    parser.add_argument("--remove", action="store_true", help="take the model out of the repository again")
    add_settings(parser)
    options = parser.parse_args()
    repository, name = options.repository, options.name
    if not _NAME.fullmatch(name):
        parser.error(f"the name is {name!r}; letters, digits, dots and hyphens are allowed, 40 at most")
    has_it = (repository / settings_file(name)).exists()
    if options.remove:
        if not has_it:
            parser.error(f"{repository} has no added model {name}")
        remove(repository, name)
        print(f"removed {name} from {repository}")
        return 0
    taken = [folder for base in configs() if (repository / (folder := folder_of(name, base))).exists()]
    if taken:
        parser.error(
            f"{repository} has {', '.join(taken)} already; choose another name, or --remove it first"
        )
    try:
        folders = add(repository, name, settings_of(options))
    except SettingsError as error:
        parser.error(str(error))
    print(f"added {', '.join(folders)}; a server that starts now serves them")
    return 0


if __name__ == "__main__":
    sys.exit(main())
