"""Files that are made from others, or that Docker reads, say what they should."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml
from make_docs import PAGES, lists, with_lists
from make_model_configs import configs
from pagetide.config import settings_fields

ROOT = Path(__file__).parents[2]
READMES = (ROOT / "README.md", *sorted(ROOT.glob("*/README.md")))


def commands() -> list[list[str]]:
    """Those of the READMEs' shell blocks that run one of our own scripts or clients, in words."""
    blocks = (block for page in READMES for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.S))
    parts = (part for block in blocks for line in block.splitlines() for part in line.split("&&"))
    return [shlex.split(part, comments=True) for part in parts if re.search(r"\w\.(py|sh)\b", part)]


def test_model_configs_are_written_from_the_contract():
    for name, text in configs().items():
        assert (ROOT / "model_repository" / name / "config.pbtxt").read_text() == text, (
            f"run scripts/make_model_configs.py ({name})"
        )


def test_postprocessing_has_one_instance_and_no_dynamic_batching():
    config = (ROOT / "model_repository/postprocessing/config.pbtxt").read_text()
    assert "count: 1" in config and "dynamic_batching {" not in config
    assert all(
        "optional: true" in line
        for line in config.split("output [")[0].splitlines()
        if "name:" in line and "data_type" in line
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_the_readmes_lists_are_written_from_what_they_list(page):
    assert with_lists(page.read_text()) == page.read_text(), "run scripts/make_docs.py"


def test_every_list_stands_on_a_page():
    pages = "".join(page.read_text() for page in PAGES)
    assert all(f"<!-- {name} -->" in pages for name in lists())


@pytest.mark.parametrize("page", READMES, ids=lambda page: page.parent.name)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)]+)\)", page.read_text())
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (page.parent / target).exists()] == []


def test_files_named_in_the_tour_of_the_package_exist():
    named = re.findall(r"`([\w/]+\.py)`", (ROOT / "backend_src/README.md").read_text())
    places = (ROOT, ROOT / "backend_src/pagetide")
    assert named and [name for name in named if not any((at / name).exists() for at in places)] == []


@pytest.mark.parametrize("command", commands(), ids=lambda command: " ".join(command)[:60])
def test_commands_of_the_readmes_exist_with_their_options(command):
    """Of our own scripts and clients; tests/server/test_scripts.py runs those that a user meets first."""
    file = next(ROOT / word for word in command if word.endswith((".py", ".sh")))
    options = {word.split("=")[0] for word in command if word.startswith("--")}
    source = file.read_text()
    if file.name == "serve.sh":
        source += (ROOT / "scripts/serve.py").read_text()
        options -= {f"--{field.name.replace('_', '-')}" for field in settings_fields()}
    if command[0].endswith("locust"):  # its options are Locust's own
        options = set()
    assert [option for option in options if f'"{option}"' not in source] == []


def test_decisions_and_models_know_no_device_by_name():
    """What differs between devices is runner/device.py, the operations and the memory of the cache."""
    package = ROOT / "backend_src/pagetide"
    files = [file for folder in ("engine", "models", "runner") for file in (package / folder).glob("*.py")]
    named = [file.name for file in files if re.search("cuda", file.read_text(), re.IGNORECASE)]
    assert named == ["device.py"]


def test_compose_has_what_triton_needs():
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    for service in compose["services"].values():
        assert service["shm_size"] == "1gb"
        assert "healthcheck" in service and "build" in service
    gpu = compose["services"]["pagetide"]["deploy"]["resources"]["reservations"]["devices"][0]
    assert gpu["driver"] == "nvidia" and gpu["capabilities"] == ["gpu"]
