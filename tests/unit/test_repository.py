"""Files that are made from others, or that Docker reads, say what they should."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import make_dashboard
import pytest
import try_image
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


WITH_VENV = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


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


def test_nothing_that_decides_reads_the_wall_clock():
    """Which may be set at any time; what is shown to people or kept in files may."""
    clock = re.compile(r"\btime\.time(_ns)?\b|\bdatetime\.(now|utcnow|today)\b|create_time|boot_time")
    package = ROOT / "backend_src" / "pagetide"
    reads = {
        str(file.relative_to(package)) for file in package.rglob("*.py") if clock.search(file.read_text())
    }
    shown = {f"gateway/{name}.py" for name in ("app", "responses", "shapes")}
    assert reads == shown | {"engine/spans.py", "serving/left_behind.py"}
    starting = [ROOT / "scripts" / f"{name}.py" for name in ("serve", "stop", "processes", "triton_server")]
    assert not any(clock.search(file.read_text()) for file in starting)


def test_compose_files_keep_to_their_schema():
    check = ["check-jsonschema", "--builtin-schema", "vendor.compose-spec", ROOT / "docker-compose.yml"]
    done = subprocess.run(check, capture_output=True, text=True, env=WITH_VENV)
    assert done.returncode == 0, done.stdout


def test_compose_has_what_triton_needs():
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    for name, service in compose["services"].items():
        assert "healthcheck" in service and service["restart"] == "unless-stopped"
        if name.startswith("pagetide"):
            assert service["shm_size"] == "1gb" and service["read_only"] and service["profiles"]
    gpu = compose["services"]["pagetide"]["deploy"]["resources"]["reservations"]["devices"][0]
    assert gpu["driver"] == "nvidia" and gpu["capabilities"] == ["gpu"]


def test_all_that_compose_can_be_told_stands_in_env():
    asked = set(re.findall(r"\$\{(\w+)", (ROOT / "docker-compose.yml").read_text()))
    lines = (ROOT / ".env").read_text().splitlines()
    told = {line.split("=")[0] for line in lines if line and not line.startswith("#")}
    assert told == asked | {"COMPOSE_PROFILES"}


@pytest.mark.parametrize("file", sorted(ROOT.glob("docker/*Dockerfile")), ids=lambda file: file.name)
def test_dockerfiles_please_hadolint(file):
    done = subprocess.run(["hadolint", file], capture_output=True, text=True, env=WITH_VENV)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("file", sorted(ROOT.glob("docker/*Dockerfile")), ids=lambda file: file.name)
def test_images_have_what_they_start(file, tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(try_image, "_run", lambda image, command: ran.append(command))
    image = try_image.Image(tmp_path, [])
    try_image.build(image, file, {"CUPY": ""})
    assert ran and image.user == "1000:1000" and image.folder == "/opt/pagetide"
    environment = {**WITH_VENV, "PYTHONPATH": f"{tmp_path}{image.env.get('PYTHONPATH', '')}"}
    for command in (image.entrypoint, image.health):
        assert command[0] == "python3"
        if command[1] == "-m":
            found = [sys.executable, "-c", f"import importlib.util as u; assert u.find_spec({command[2]!r})"]
            subprocess.run(found, env=environment, cwd=tmp_path, check=True)
        elif command[1] != "-c":
            assert (tmp_path / "opt/pagetide" / command[1]).is_file()


def test_the_table_of_images_is_what_is_built():
    table = (ROOT / "docker" / "README.md").read_text().split("<!-- images -->\n")[1].split("\n\n")[0]
    names, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    built = dict(re.findall(r"^ARG (\w+)=(\S*)", (ROOT / "docker" / "Dockerfile").read_text(), re.M))
    found = [dict(zip(names, row, strict=True)) for row in rows]
    assert found[0]["`TRITON_RELEASE`"] == f"{built['TRITON_RELEASE']} (default)"
    for row in found:
        assert built["TORCH"] == f"torch=={row['torch']}"
        assert built["CUPY"].split("==") == row["CuPy"].split()
        # Of one generation, or one of the two finds no library.
        assert row["CuPy"].startswith(f"cupy-cuda{row['its CUDA'].split('.')[0]}x")


def test_what_compose_mounts_is_there():
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    mounted = [one.split(":")[0] for s in compose["services"].values() for one in s.get("volumes", [])]
    assert [path for path in mounted if path.startswith("./") and not (ROOT / path).exists()] == []


def test_the_dashboard_is_written_from_its_table():
    assert make_dashboard.FILE.read_text() == make_dashboard.text(), "run scripts/make_dashboard.py"
