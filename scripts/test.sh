#!/usr/bin/env bash
# Sets up what is missing and runs all checks and tests. Arguments go to pytest: ./scripts/test.sh tests/unit -k scheduler
set -euo pipefail
cd "$(dirname "$0")/.."
./scripts/setup.sh --test
export PYTHONPATH=backend_src
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/lint-imports
exec .venv/bin/python -m pytest "$@"
