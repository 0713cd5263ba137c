"""What holding a method against all baselines costs: tuning, fitting, ranking, the table.

    rporec bench baselines [--json]

The embedded world with 7,000 users and 2,520 items, window 20. Every baseline is tuned and fitted, the networks
with three seeds; test is ranked in both conventions and the table made of it. Then the same again, with what was
fitted read back from the disk. `ndcg@10` is there to show that what was timed works.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from actors.cluster import cores
from benchmarks.result import result
from rporec.baselines.store import BaselineStore
from rporec.config import BASELINES, Config, EvaluateConfig, SyntheticConfig
from rporec.data import Dataset, build
from rporec.data.synthetic import write_synthetic
from rporec.recipes.evaluation import rank, summarize
from rporec.recipes.methods import baselines
from rporec.report.live import progress

WORLD = SyntheticConfig(users=7000, series=420, volumes=6)


def world(folder: Path, config: SyntheticConfig) -> Dataset:
    write_synthetic(folder, config, 0)
    return build(folder / "interactions.parquet", folder / "items.parquet", folder / "data", split="time", window=20)


def spent() -> float:
    """CPU seconds of this process and of those that it has had."""
    return sum(os.times()[:4])


def measure(shape: SyntheticConfig, names: tuple[str, ...] = BASELINES, seeds: int = 3) -> dict[str, Any]:
    """Wall and CPU seconds of each part, and the test metrics of each baseline."""
    config = Config(evaluate=EvaluateConfig(baselines=names, seeds=seeds))
    wall: dict[str, float] = {}
    cpu: dict[str, float] = {}

    def timed(name: str, began: tuple[float, float]) -> None:
        wall[name], cpu[name] = time.perf_counter() - began[0], spent() - began[1]

    with tempfile.TemporaryDirectory() as folder, progress("baselines", console=Console(stderr=True)) as bar:
        dataset = world(Path(folder), shape)
        test = dataset.split("test")

        def evaluated(name: str) -> dict[str, Any]:
            began = time.perf_counter(), spent()
            store = BaselineStore(
                Path(folder) / "baselines",
                dataset,
                exclude_history=True,
                refit=False,
                progress=lambda note: bar.update(note=note),
            )
            summary = summarize(dataset, config, rank(dataset, baselines(store, config, test, cores()), lambda _: None))
            timed(name, began)
            for one in names:
                wall.setdefault(f"tune_{one}", store.record(one)["seconds"])
                cpu.setdefault(f"tune_{one}", store.record(one)["cpu_seconds"])
            return summary

        methods = evaluated("everything")["conventions"]["exclude_history"]["methods"]
        evaluated("again")
    size = {"users": len(dataset.user_ids), "items": len(dataset.catalog), "test_samples": len(test)}
    return {"wall": wall, "cpu": cpu, "size": size, "ndcg@10": {one: methods[one]["ndcg@10"] for one in names}}


QUICK = {"shape": SyntheticConfig(users=500, series=40, volumes=4), "seeds": 1}


def run(shape: SyntheticConfig = WORLD, seeds: int = 3) -> dict[str, Any]:
    found = measure(shape, seeds=seeds)
    ratios = {"again_over_everything": round(found["wall"]["again"] / found["wall"]["everything"], 3)}
    return result("baselines", ratios, found["wall"], found["cpu"], **found["size"], **{"ndcg@10": found["ndcg@10"]})
