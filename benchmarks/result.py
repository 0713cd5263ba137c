"""What every benchmark prints: one JSON object, with the machine that it ran on."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any


def result(
    name: str, ratios: dict[str, Any], wall_seconds: dict[str, float], cpu_seconds: dict[str, float], **more: Any
) -> dict[str, Any]:
    """`ratios` are what claims are made of: both sides of each were measured in one run."""
    return {
        "name": name,
        "machine": machine(),
        "ratios": ratios,
        "wall_seconds": {key: round(value, 4) for key, value in wall_seconds.items()},
        "cpu_seconds": {key: round(value, 4) for key, value in cpu_seconds.items()},
        **more,
    }


def machine() -> dict[str, Any]:
    """Processor, cores that this process may use, memory, load before the benchmark adds its own."""
    models = [line for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = [line for line in _lines("/proc/meminfo") if line.startswith("MemTotal")]
    return {
        "cpu": models[0].partition(":")[2].strip() if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(int(memory[0].split()[1]) / 2**20, 1) if memory else None,
        "python": platform.python_version(),
        "load_1m": round(os.getloadavg()[0], 2),
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
