"""Files that are made from others, or that Docker reads, say what they should."""

from __future__ import annotations

from pathlib import Path

import yaml
from make_docs import with_tables
from make_model_configs import configs
from pagetide.config import settings_fields
from pagetide.contract.fields import FIELDS

ROOT = Path(__file__).parents[2]


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


def test_the_readmes_tables_are_written_from_their_definitions():
    readme = (ROOT / "README.md").read_text()
    assert with_tables(readme) == readme, "run scripts/make_docs.py"
    assert all(f"| `{field.name}`" in readme for field in (*settings_fields(), *FIELDS))


def test_compose_has_what_triton_needs():
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    for service in compose["services"].values():
        assert service["shm_size"] == "1gb"
        assert "healthcheck" in service and "build" in service
    gpu = compose["services"]["pagetide"]["deploy"]["resources"]["reservations"]["devices"][0]
    assert gpu["driver"] == "nvidia" and gpu["capabilities"] == ["gpu"]
