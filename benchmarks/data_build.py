"""How fast and in how much memory a data set is built: 10 M generated interactions, one core.

    rporec bench data [--json]
    python -m benchmarks.data_build [--rows 10000000] [--format parquet|csv|jsonl]

The first builds from Parquet and from CSV, the second prints one JSON object of one format. The build runs in a
process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
from rich.console import Console

from benchmarks.result import machine, result
from rporec.report.live import progress
from rporec.run import RunError

ROWS = 10_000_000
BATCH = 1_000_000  # rows


def write_source(folder: Path, rows: int, kind: str) -> Path:
    """Interactions with Zipf-like items, strings as ids; returns the interactions file."""
    rng = np.random.default_rng(0)
    users, items = max(1, rows // 15), max(2, rows // 100)
    names = [f"B{i:09d}" for i in range(items)]
    pq.write_table(pa.table({"item_id": names, "title": [f"Item {i}" for i in range(items)]}), folder / "items.parquet")
    path = folder / f"interactions.{kind}"
    user_names = pa.array([f"A{u:011d}" for u in range(users)])
    schema = pa.schema([("user_id", pa.string()), ("item_id", pa.string()), ("timestamp", pa.int64())])
    sink = pq.ParquetWriter(path, schema) if kind == "parquet" else None
    sink = sink or (pacsv.CSVWriter(path, schema) if kind == "csv" else None)
    with sink or path.open("w", encoding="utf-8") as out:
        for start in range(0, rows, BATCH):
            n = min(BATCH, rows - start)
            table = pa.table(
                {
                    "user_id": user_names.take(pa.array(rng.integers(users, size=n))),
                    "item_id": pa.array(names).take(pa.array((items * rng.random(n) ** 3).astype(np.int64))),
                    "timestamp": rng.integers(1_500_000_000, 1_700_000_000, n),
                },
                schema=schema,
            )
            if sink is not None:
                out.write_table(table)
            else:
                out.writelines(json.dumps(row) + "\n" for row in table.to_pylist())
    return path


def measure(folder: Path, path: Path) -> dict[str, float]:
    """Build in this process, on one core."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    pa.set_cpu_count(1)
    from rporec.data import build

    wall, cpu = time.perf_counter(), time.process_time()
    dataset = build(path, folder / "items.parquet", folder / "built")
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    start = time.perf_counter()
    type(dataset).load(folder / "built")
    return {
        "build": wall,
        "build_cpu": cpu,
        "load": time.perf_counter() - start,
        "peak": peak,
        "samples": len(dataset.sample_row),
    }


def built(rows: int, kind: str) -> dict[str, float]:
    """As `measure`, of so many generated interactions, in a process of its own; `bytes`: of the source."""
    with tempfile.TemporaryDirectory() as name:
        size = write_source(Path(name), rows, kind).stat().st_size
        child = [sys.executable, "-m", "benchmarks.data_build", "--format", kind, "--folder", name]
        root = Path(__file__).parent.parent
        done = subprocess.run(child, cwd=root, capture_output=True, text=True)
        if done.returncode:
            raise RunError(f"rporec bench data: {' '.join(done.stderr[-600:].split())}")
        return json.loads(done.stdout) | {"bytes": size}


QUICK = {"rows": 2_000_000, "kinds": ("parquet",)}


def run(rows: int = ROWS, kinds: Sequence[str] = ("parquet", "csv")) -> dict[str, Any]:
    before = machine()
    ratios: dict[str, float] = {}
    wall: dict[str, float] = {}
    cpu: dict[str, float] = {}
    with progress("data", total=len(kinds), console=Console(stderr=True)) as bar:
        for number, kind in enumerate(kinds):
            found = built(rows, kind)
            ratios |= {
                f"interactions_per_second_{kind}": round(rows / found["build"]),
                f"interactions_per_cpu_second_{kind}": round(rows / found["build_cpu"]),
                f"peak_gib_{kind}": round(found["peak"] / 2**30, 2),
                f"source_mib_{kind}": round(found["bytes"] / 2**20, 1),
            }
            wall |= {f"build_{kind}": found["build"], f"load_{kind}": found["load"]}
            cpu[f"build_{kind}"] = found["build_cpu"]
            bar.update(number + 1)
    return result("data", ratios, wall, cpu, machine=before, interactions=rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--format", choices=("parquet", "csv", "jsonl"), default="parquet")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder is None:
        print(json.dumps(run(options.rows, [options.format])))
    else:
        print(json.dumps(measure(options.folder, options.folder / f"interactions.{options.format}")))


if __name__ == "__main__":
    main()
