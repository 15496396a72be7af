#!/usr/bin/env bash
# Stops servers started with ./scripts/serve.sh --detach. ./scripts/stop.sh --help lists the options.
set -euo pipefail
cd "$(dirname "$0")/.."
exec .venv/bin/python scripts/stop.py "$@"
