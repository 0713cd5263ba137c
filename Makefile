# Everything on a fresh Debian or Ubuntu machine with git, make, Python and its venv module.
#   make demo    environment, then the main job on the embedded data (runs/demo)
#   make test    environment, then the tests
.PHONY: setup demo test test-chaos test-browser test-cluster lint lock clean

setup: .venv/.ready

.venv/.ready: scripts/setup-cpu.sh requirements/cpu.lock requirements/overrides-cpu.txt pyproject.toml
	./scripts/setup-cpu.sh
	@touch $@

demo: setup
	@if [ -e runs/demo ]; then mv runs/demo "runs/demo.$$(date +%Y%m%d-%H%M%S)"; fi
	.venv/bin/rporec train configs/demo.yaml --run runs/demo

test: setup lint
	.venv/bin/python -m pytest -m "not chaos and not cluster_hosts"

test-chaos: setup
	.venv/bin/python -m pytest -m chaos

test-browser test-cluster: setup
	.venv/bin/python -m pytest tests/$(@:test-%=%)

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

lock: setup
	.venv/bin/uv pip compile --quiet --universal --python-version 3.11 --no-emit-package rporec --no-annotate \
		--override requirements/overrides-cpu.txt $(foreach d,$(PIP_FIND_LINKS),--find-links $(d)) \
		requirements/cpu.in --output-file requirements/cpu.lock

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache
