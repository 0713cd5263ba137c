"""The one function that ranks every method, and the metrics that follow from a rank."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

CHUNK_SCORES = 2_000_000  # scores compared at once: a few MB of booleans, whatever the size of the catalogue


def ranks(scores: np.ndarray, targets: np.ndarray, exclude: Sequence[np.ndarray] | None = None) -> np.ndarray:
    """Rank of each target among all items, float64 [B], counted from 1.

    `rank = 1 + #greater + 0.5 * #equal` over the other items, so a tie costs half a place and a
    constant score gives the middle of the catalogue, not its top.

    scores: [B, N], any real dtype. targets: [B] item indices. exclude: per row the item indices that
    leave the ranking (the user's earlier items; repeats are fine); the target never leaves.
    Raises ValueError when a score is not finite or an index is outside the catalogue.
    """
    scores = np.asarray(scores)
    targets = np.asarray(targets, dtype=np.int64)
    if scores.ndim != 2 or targets.shape != scores.shape[:1]:
        raise ValueError(f"ranks: scores {scores.shape} and targets {targets.shape} are not [B, N] and [B]")
    if exclude is not None and len(exclude) != len(targets):
        raise ValueError(f"ranks: {len(exclude)} exclusions for {len(targets)} targets")
    items = scores.shape[1]
    _check_indices(targets, items, "target")
    result = np.empty(len(targets))
    step = max(1, CHUNK_SCORES // max(items, 1))
    for start in range(0, len(targets), step):
        rows = slice(start, start + step)
        result[rows] = _chunk_ranks(scores[rows], targets[rows], exclude[rows] if exclude is not None else (), start)
    return result


def list_scores(lists: Sequence[Sequence[int]], items: int) -> np.ndarray:
    """Scores [B, items] of rankings that name their best items only, best first.

    What a list does not name ties below all that it names, so `ranks` gives it the middle of those
    places: within any cut-off up to the length of the lists, a target that is not named is a miss.
    """
    scores = np.zeros((len(lists), items), np.float32)
    for row, named in zip(scores, lists, strict=True):
        row[np.asarray(named, np.int64)] = np.arange(len(named), 0, -1)
    return scores


def _chunk_ranks(scores: np.ndarray, targets: np.ndarray, exclude: Sequence[np.ndarray], start: int) -> np.ndarray:
    finite = np.isfinite(scores).all(axis=1)
    if not finite.all():
        raise ValueError(f"ranks: row {start + int(np.argmin(finite))} holds a score that is not finite")
    target_scores = scores[np.arange(len(targets)), targets]
    greater = (scores > target_scores[:, None]).sum(axis=1)
    equal = (scores == target_scores[:, None]).sum(axis=1) - 1  # the target equals itself
    if len(exclude):
        owner = np.repeat(np.arange(len(exclude)), [len(items) for items in exclude])
        items = np.concatenate([np.asarray(e, dtype=np.int64) for e in exclude])
        _check_indices(items, scores.shape[1], "excluded item")
        owner, items = np.divmod(np.unique(owner * scores.shape[1] + items), scores.shape[1])
        others = items != targets[owner]
        owner, items = owner[others], items[others]
        removed = scores[owner, items]
        greater -= np.bincount(owner[removed > target_scores[owner]], minlength=len(targets))
        equal -= np.bincount(owner[removed == target_scores[owner]], minlength=len(targets))
    return 1 + greater + 0.5 * equal


def _check_indices(indices: np.ndarray, items: int, what: str) -> None:
    if len(indices) and not (indices.min() >= 0 and indices.max() < items):
        raise ValueError(f"ranks: {what} outside the catalogue of {items} items: {indices.min()} … {indices.max()}")


def hit(ranks: np.ndarray, k: int) -> np.ndarray:
    """HR@k of each rank, float64: 1 where `rank <= k`."""
    return (np.asarray(ranks) <= k).astype(np.float64)


def ndcg(ranks: np.ndarray, k: int | None = None) -> np.ndarray:
    """NDCG@k of each rank with one relevant item, float64: `hit / log2(rank + 1)`; k None: no cut."""
    ranks = np.asarray(ranks, dtype=np.float64)
    gain = 1.0 / np.log2(ranks + 1.0)
    return gain if k is None else np.where(ranks <= k, gain, 0.0)
