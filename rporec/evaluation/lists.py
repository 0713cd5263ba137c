"""What a method shows beside how well it ranks: its top lists, how much of the catalogue they cover, how alike they are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp

TOP = 10  # items of a list


def top_lists(scores: np.ndarray, exclude: Sequence[np.ndarray] | None = None, k: int = TOP) -> np.ndarray:
    """int64 [B, k]: the best items of each row, in no order; of equal scores the lower index.

    scores: [B, N] with N >= k. exclude: per row the items that may not appear.
    """
    scores = np.array(scores, dtype=np.float64)
    for row, items in enumerate(exclude or ()):
        scores[row, items] = -np.inf
    k = min(k, scores.shape[1])
    threshold = np.partition(scores, -k, axis=1)[:, -k]
    above = scores > threshold[:, None]
    room = k - above.sum(axis=1)
    tied = scores == threshold[:, None]
    tied &= np.cumsum(tied, axis=1) <= room[:, None]
    return np.nonzero(above | tied)[1].reshape(len(scores), k)


class TopLists:
    """The lists of each method, as they come; a sample that comes again is the method's next draw."""

    def __init__(self) -> None:
        self._parts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}

    def add(
        self, method: str, samples: np.ndarray, scores: np.ndarray, exclude: Sequence[np.ndarray] | None = None
    ) -> None:
        self._parts.setdefault(method, []).append((np.asarray(samples), top_lists(scores, exclude)))

    def summary(self, items: int, vectors: sp.csr_matrix | None = None) -> dict[str, dict[str, float]]:
        """method -> `coverage@10` and, with vectors [items, W] of norm 1 or 0, `diversity@10`."""
        result = {}
        for method, parts in self._parts.items():
            samples, lists = (np.concatenate(column) for column in zip(*parts, strict=True))
            draw = _occurrence(samples)
            draws = [lists[draw == number] for number in range(draw.max() + 1)] if len(draw) else []
            entry = {f"coverage@{TOP}": float(np.mean([coverage(part, items) for part in draws] or [0.0]))}
            if vectors is not None and len(lists):
                entry[f"diversity@{TOP}"] = float(diversity(lists, vectors).mean())
            result[method] = entry
        return result


def coverage(lists: np.ndarray, items: int) -> float:
    """Share of the catalogue that stands in at least one list; Ge et al. 2010, RecSys, "catalog coverage"."""
    return len(np.unique(lists)) / items


def diversity(lists: np.ndarray, vectors: sp.csr_matrix) -> np.ndarray:
    """[B]: mean of 1 - cosine over the pairs of a list [B, k]; one minus Ziegler et al. 2005's intra-list similarity.

    The pairs' dot products add up to (|sum of vectors|^2 - sum of |vector|^2) / 2.
    """
    rows, k = lists.shape
    shown = sp.csr_matrix((np.ones(lists.size), lists.ravel(), np.arange(rows + 1) * k), shape=(rows, vectors.shape[0]))
    total = (shown @ vectors).power(2).sum(axis=1)
    own = np.asarray(vectors.power(2).sum(axis=1)).ravel()[lists].sum(axis=1)
    return 1 - (np.asarray(total).ravel() - own) / max(k * (k - 1), 1)


def _occurrence(values: np.ndarray) -> np.ndarray:
    """How often each value came before, in order of appearance."""
    order = np.argsort(values, kind="stable")
    _, first, counts = np.unique(values[order], return_index=True, return_counts=True)
    result = np.empty(len(values), dtype=np.int64)
    result[order] = np.arange(len(values)) - np.repeat(first, counts)
    return result
