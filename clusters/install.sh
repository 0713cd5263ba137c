#!/usr/bin/env bash
# Installs this checkout on a node, into .venv/: on CPU from the lock, where there is a GPU with `.[gpu]`.
# Run again it does nothing unless the requirements have changed.
set -euo pipefail
cd "$(dirname "$0")/.."

if ! command -v nvidia-smi >/dev/null; then
    exec make setup
fi
[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
wanted=$(sha256sum pyproject.toml requirements/cpu.lock)
[ "$(cat .venv/.ready 2>/dev/null)" != "$wanted" ] || exit 0
# Nodes of one cluster must agree on Ray's version to the last digit: the lock has it.
.venv/bin/pip install --quiet --editable '.[gpu]' "$(grep '^ray==' requirements/cpu.lock)"
echo "$wanted" >.venv/.ready
