"""Every benchmark, one after the other, each in a process of its own and as short as it can be.

    rporec bench all [--json]

Twenty minutes on two quiet cores. Each runs as with `--quick`: what `QUICK` of its module says, fewer rounds or a
smaller size, so its figures scatter more than those of the benchmark by itself. One that fails is reported with its
last words, and the others run all the same.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.result import machine
from rporec.arguments import BENCHMARKS
from rporec.report.live import progress


def run(names: Iterable[str] | None = None) -> dict[str, Any]:
    """`ratios` by benchmark and name; `results`: what each printed, `failed`: why one did not."""
    names = sorted(set(BENCHMARKS) - {"all"}) if names is None else list(names)
    before = machine()
    results: dict[str, Any] = {}
    failed: dict[str, str] = {}
    wall: dict[str, float] = {}
    with progress("all", total=len(names), console=Console(stderr=True)) as bar:
        for number, name in enumerate(names):
            bar.update(number, note=name)
            began = time.perf_counter()
            told = _alone(name)
            wall[name] = round(time.perf_counter() - began, 1)
            if isinstance(told, str):
                failed[name] = told
            else:
                results[name] = told
    ratios = {f"{name}.{key}": value for name, one in results.items() for key, value in one["ratios"].items()}
    ratios |= {f"{name}.failed": words for name, words in failed.items()}
    return {
        "name": "all",
        "machine": before,
        "ratios": ratios,
        "wall_seconds": wall,
        "results": results,
        "failed": failed,
    }


def _alone(name: str) -> dict[str, Any] | str:
    """Its result, or its last words."""
    root = Path(__file__).parent.parent
    here = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "rporec.cli", "bench", name, "--quick", "--json"]
    done = subprocess.run(command, cwd=root, env={**os.environ, "PYTHONPATH": here}, capture_output=True, text=True)
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return " ".join(done.stderr[-600:].split()) or f"exit status {done.returncode}"
