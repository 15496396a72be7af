#!/usr/bin/env bash
# Checks and measures the GPU engine on a machine with a GPU. Needs no set-up: the python3 that has torch, the Triton language, cupy,
# transformers, numba, msgspec, pyzmq and (for the tests) pytest and hypothesis. Arguments: scripts/gpu_check.sh --help
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=backend_src:scripts:tests/engine${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" scripts/gpu_check.py "$@"
