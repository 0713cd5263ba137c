"""The scalars of a sum of scores, searched for and not trained.

Cross entropy picks worse ones than a search on the ranking metric itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from rporec.evaluation.ranking import ndcg, ranks

GRID = (0.0, *(2.0**power for power in range(-5, 6)))
REFINE = (0.5, 0.7, 0.85, 1.2, 1.4)  # of the present scalar, tried beside the grid
SWEEPS = 5  # over all scalars at most
CANDIDATES = 40  # best items of each component per sample that the search ranks
ABSENT = -1e9  # score of a candidate slot that a row does not need


def search_weights(
    components: Mapping[str, np.ndarray],
    targets: np.ndarray,
    exclude: Sequence[np.ndarray] | None = None,
) -> tuple[dict[str, float], float]:
    """Scalars of the components that maximise NDCG@10 of their sum, and that NDCG.

    Coordinate ascent over a log grid with 0 in it and then round the present value, from two starts:
    the best component alone, and all at once. Each component is measured in units of its own spread,
    so that one grid fits all. While it searches, a sample's candidates are the target and the best
    `CANDIDATES` items of each component; the NDCG it returns is over all items.

    components: name -> [B, N]. targets: int [B]. exclude: per row the items that leave the ranking.
    Deterministic; of equals the smallest scalar wins, so a component that helps nothing ends at 0.
    """
    table = _candidates(components, targets, exclude)  # [C, B, M], the target in column 0
    there = table[0] > ABSENT
    units = np.array([float(part[there].std()) for part in table])
    table = np.where(there, table / np.where(units > 0, units, 1)[:, None, None], 0).astype(np.float32)
    absent = np.where(there, 0, ABSENT).astype(np.float32)
    column = np.zeros(len(targets), dtype=np.int64)

    def value(scores: np.ndarray) -> float:
        return round(float(ndcg(ranks(scores, column), 10).mean()), 9)

    alone = np.eye(len(table))[int(np.argmax([value(part + absent) for part in table]))]
    found = [_ascend(start, table, absent, value) for start in (alone, np.ones(len(table)))]
    weights = max(found, key=lambda pair: pair[1])[0] / np.where(units > 0, units, np.inf)
    weights /= weights[weights > 0].max() if weights.any() else 1
    total = np.zeros(next(iter(components.values())).shape, dtype=np.float32)
    for weight, part in zip(weights, components.values(), strict=True):
        total += np.float32(weight) * part
    best = float(ndcg(ranks(total, targets, exclude), 10).mean())
    return {name: float(weight) for name, weight in zip(components, weights, strict=True)}, best


def _ascend(
    weights: np.ndarray, table: np.ndarray, absent: np.ndarray, value: Callable[[np.ndarray], float]
) -> tuple[np.ndarray, float]:
    weights = weights.copy()
    best = value(np.tensordot(weights.astype(np.float32), table, 1) + absent)
    for _ in range(SWEEPS):
        before = best
        for number, part in enumerate(table):
            others = np.where(np.arange(len(table)) == number, 0, weights).astype(np.float32)
            rest = np.tensordot(others, table, 1) + absent
            choices = sorted({*GRID, *(weights[number] * factor for factor in (1.0, *REFINE))})
            values = [value(rest + np.float32(choice) * part) for choice in choices]
            best, weights[number] = max(values), choices[int(np.argmax(values))]
        if best - before < 1e-5:
            break
    return weights, best


def _candidates(
    components: Mapping[str, np.ndarray], targets: np.ndarray, exclude: Sequence[np.ndarray] | None
) -> np.ndarray:
    parts = list(components.values())
    rows, items = np.arange(len(targets)), parts[0].shape[1]
    gone = np.zeros((len(rows), items), dtype=bool)
    for row, excluded in enumerate(exclude or ()):
        gone[row, excluded] = True
    gone[rows, targets] = True  # it has a column of its own
    chosen = np.zeros_like(gone)
    first = max(items - CANDIDATES, 0)
    for part in parts:
        best = np.argpartition(np.where(gone, -np.inf, part), first, axis=1)[:, first:]
        np.put_along_axis(chosen, best, True, axis=1)
    chosen &= ~gone
    owner, item = np.nonzero(chosen)
    counts = np.bincount(owner, minlength=len(rows))
    place = 1 + np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    table = np.full((len(parts), len(rows), 1 + counts.max(initial=0)), ABSENT, dtype=np.float32)
    for number, part in enumerate(parts):
        table[number, rows, 0] = part[rows, targets]
        table[number, owner, place] = part[owner, item]
    return table
