#!/usr/bin/env bash
# The main job: sets up what is missing, starts Triton with Pagetide, streams one completion, serves until Ctrl-C.
# ./scripts/serve.sh --help lists all options.
set -euo pipefail
cd "$(dirname "$0")/.."
index=()
for ((i = 1; i <= $#; i++)); do
    case ${!i} in
        --torch-index) next=$((i + 1)); index=(--torch-index "${!next:?--torch-index needs a URL}") ;;
        --torch-index=*) value=${!i}; index=(--torch-index "${value#*=}") ;;
    esac
done
./scripts/setup.sh "${index[@]}"
exec .venv/bin/python scripts/serve.py "$@"
