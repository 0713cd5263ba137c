#!/usr/bin/env bash
# Installs this checkout into .venv/: from the lock for CPU, `.[gpu]` for CUDA.
#   clusters/install.sh [cpu|cuda]    without a word: by whether this machine has a GPU
# Run again it does nothing unless what is asked for has changed.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ $# = 0 ]; then
    if command -v nvidia-smi >/dev/null; then set -- cuda; else set -- cpu; fi
fi
wanted="$1 $(cat pyproject.toml requirements/* | sha256sum)"
[ "$(cat .venv/.installed 2>/dev/null)" != "$wanted" ] || exit 0
case $1 in
cpu) ./scripts/setup-cpu.sh ;;
cuda)
    [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
    # The nodes of a cluster must agree on Ray's version to the last digit, and the head may be one without a GPU.
    .venv/bin/pip install --quiet --editable '.[gpu]' "$(grep '^ray==' requirements/cpu.lock)"
    ;;
*)
    echo "install: $1 is neither cpu nor cuda" >&2
    exit 2
    ;;
esac
echo "$wanted" >.venv/.installed
