#!/usr/bin/env bash
# Writes the lock files anew from pyproject.toml. torch is left out, with what it needs: scripts/setup.sh installs it by itself.
set -euo pipefail
cd "$(dirname "$0")/.."
WITHOUT=$(mktemp)
trap 'rm "$WITHOUT"' EXIT
echo "torch ; python_version < '3'" > "$WITHOUT"
compile() {
    local file=$1
    shift
    uv pip compile pyproject.toml "$@" --universal --python-version 3.10 --override "$WITHOUT" --no-header --no-annotate -q -o "$file"
    sed -i "1i # Pinned versions; written by scripts/lock.sh" "$file"
}
compile requirements-test.lock --extra server --extra gateway --extra test
compile requirements.lock --extra server --extra gateway -c requirements-test.lock
