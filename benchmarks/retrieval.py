"""What finding the best of a million items costs: an inverted file against reading them all.

    rporec bench retrieval [--json]

Vectors as a trained head's are, in clusters: one of `size / 250` centres (normal) plus as much noise again in
norm (`NOISE`), times a log-normal length, for popular items have longer vectors. Queries are drawn like items.
One query at a time on one core, k = 10, in four cases: all items, a random filter that keeps one in ten, 100
excluded items (the query's best, as a history would be), and both. Recall is the share of the exact ten that
the approximation finds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil

from benchmarks.result import result
from rporec.models.item_index import ApproximateIndex, ExactIndex, Found, ItemIndex, permitted

K = 10
EXCLUDED = 100
KEPT = 0.1  # share of the items that the filter allows
NOISE = 1.0  # its norm, in norms of a centre
LENGTH = 0.2  # standard deviation of the logarithm of an item's length
Case = tuple[np.ndarray | None, np.ndarray | None]  # allowed and excluded


def clustered(size: int, dim: int, queries: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(items [size, dim], queries [queries, dim]), float32."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((max(1, size // 250), dim), dtype=np.float32)

    def draw(count: int) -> np.ndarray:
        points = NOISE * rng.standard_normal((count, dim), dtype=np.float32)
        points += centres[rng.integers(len(centres), size=count)]
        return points

    items, asked = draw(size), draw(queries)
    items *= rng.lognormal(0, LENGTH, (size, 1)).astype(np.float32)
    return items, asked


def measure(size: int, *, dim: int = 128, queries: int = 200, warm_up: int = 10) -> dict[str, Any]:
    """Seconds and bytes of building, then per case latencies in milliseconds and recall."""
    vectors, asked = clustered(size, dim, queries + warm_up)
    before, wall, cpu = _rss(), time.perf_counter(), time.process_time()
    approximate = ApproximateIndex.build(vectors)
    built = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    memory = {"vectors_mib": vectors.nbytes / 2**20, "index_mib": approximate.nbytes / 2**20}
    memory |= {"index_rss_mib": _rss() - before, "rss_mib": _rss()}
    exact = ExactIndex(vectors)
    allowed = np.random.default_rng(1).random((16, size)) < KEPT
    best = [exact.search(query, EXCLUDED)[0] for query in asked]
    cases: dict[str, Callable[[int], Case]] = {
        "all": lambda row: (None, None),
        "filtered": lambda row: (allowed[row % len(allowed)], None),
        "excluded": lambda row: (None, best[row]),
        "filtered_and_excluded": lambda row: (allowed[row % len(allowed)], best[row]),
    }
    found = {name: _case(approximate, exact, asked, case, warm_up) for name, case in cases.items()}
    return {"built": built, "memory": {name: round(value, 1) for name, value in memory.items()}, "cases": found}


def _case(
    approximate: ItemIndex, exact: ItemIndex, queries: np.ndarray, case: Callable[[int], Case], warm_up: int
) -> dict[str, float]:
    near, fast = _timed(approximate, queries, case)
    true, slow = _timed(exact, queries, case)
    shared = [len(np.intersect1d(a, b)) / len(b) for (a, _), (b, _) in zip(near, true, strict=True)]
    numbers = {"recall_at_10": float(np.mean(shared[warm_up:]))}
    for name, seconds in (("", fast), ("exact_", slow)):
        for quantile in (50, 99):
            numbers[f"{name}p{quantile}_ms"] = 1000 * float(np.percentile(seconds[warm_up:], quantile))
    return {name: round(value, 4) for name, value in numbers.items()}


def _timed(index: ItemIndex, queries: np.ndarray, case: Callable[[int], Case]) -> tuple[list[Found], list[float]]:
    found, seconds = [], []
    for row, query in enumerate(queries):
        allowed, excluded = case(row)
        start = time.perf_counter()
        found.append(index.search(query, K, permitted(len(index.vectors), allowed, excluded)))
        seconds.append(time.perf_counter() - start)
    return found, seconds


def _rss() -> float:
    """MiB."""
    return psutil.Process().memory_info().rss / 2**20


QUICK = {"size": 200_000}


def run(size: int = 1_000_000) -> dict[str, Any]:
    found = measure(size)
    ratios: dict[str, float] = {}
    for name, numbers in found["cases"].items():
        ratios[f"recall_at_10_{name}"] = numbers["recall_at_10"]
        ratios[f"exact_over_approximate_{name}"] = round(numbers["exact_p50_ms"] / numbers["p50_ms"], 2)
    built = found.pop("built")
    return result("retrieval", ratios, {"build": built["wall"]}, {"build": built["cpu"]}, items=size, **found)
