#!/usr/bin/env bash
# Makes .venv: the locked CPU set-up and this checkout, editable. Run by `make setup`.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "setup: $("$python" --version) is too old; rporec needs Python 3.11 or newer (PYTHON=... make setup)" >&2
    exit 2
}
[ -x .venv/bin/python ] || "$python" -m venv .venv
if .venv/bin/python -c 'from importlib.metadata import version; version("vllm")' 2>/dev/null; then
    echo "setup: .venv has the vllm for GPUs and is left as it is" >&2
    exit
fi
[ -x .venv/bin/uv ] || .venv/bin/pip install --quiet --disable-pip-version-check uv

# uv does not read pip's own find-links, which is where a machine may keep its CPU build of torch.
# A pip setting can come from a file (global.*) or from the environment (:env:.*).
find_links=()
for key in global.find-links :env:.find-links; do
    for place in $(.venv/bin/pip config get "$key" 2>/dev/null || true); do
        find_links+=(--find-links "$place")
    done
done

# Compiled once here, not at the start of each of the many processes of a run.
install() { .venv/bin/uv pip install --quiet --compile-bytecode --python .venv/bin/python --override requirements/overrides-cpu.txt "$@"; }

# Configured sources first: where PyTorch's own index cannot be reached, asking it slows every look-up.
install "${find_links[@]}" --requirement requirements/cpu.lock ||
    install "${find_links[@]}" --torch-backend cpu --requirement requirements/cpu.lock
install --no-deps --no-build-isolation --editable .
.venv/bin/python -c 'import torch, transformers, vllm' >/dev/null
