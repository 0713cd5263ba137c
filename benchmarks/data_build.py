"""How fast and in how much memory a data set is built: 10 M generated interactions, one core.

    python benchmarks/data_build.py [--rows 10000000] [--format parquet|csv|jsonl]

Prints one JSON object; the build runs in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--format", choices=("parquet", "csv", "jsonl"), default="parquet")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder is not None:
        print(json.dumps(measure(options.folder, options.folder / f"interactions.{options.format}")))
        return
    with tempfile.TemporaryDirectory() as name:
        path = write_source(Path(name), options.rows, options.format)
        size = path.stat().st_size
        child = [sys.executable, __file__, "--format", options.format, "--folder", name]
        found = json.loads(subprocess.run(child, check=True, capture_output=True, text=True).stdout)
    result = {
        "name": "data-build",
        "machine": {"cores": os.cpu_count(), "platform": platform.platform(), "python": platform.python_version()},
        "ratios": {
            "interactions_per_second": options.rows / found["build"],
            "interactions_per_cpu_second": options.rows / found["build_cpu"],
        },
        "wall_seconds": {"build": found["build"], "load": found["load"]},
        "cpu_seconds": {"build": found["build_cpu"]},
        "peak_rss_bytes": found["peak"],
        "interactions": options.rows,
        "samples": found["samples"],
        "source": {"format": options.format, "bytes": size},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
