"""Who follows whom: sparse matrices between items, and the histories that start from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp

if TYPE_CHECKING:
    from rporec.data import Dataset

LAGS = 10  # farthest pair of a user's interactions that makes a rule
RECENT = 5  # newest history items that rules and neighbours start from, weights falling linearly


def transitions(dataset: Dataset, rows: np.ndarray, lags: int = LAGS) -> sp.csr_matrix:
    """float32 [N, N], row j: how often i follows j in `rows`, weight 1 at distance 1 falling linearly to 1 / lags.

    rows: positions in `dataset.items`, ascending.
    """
    owner = dataset.owner[rows]
    items = dataset.items[rows]
    size = len(dataset.catalog)
    total = sp.csr_matrix((size, size), dtype=np.float32)
    for lag in range(1, lags + 1):
        first = np.flatnonzero(owner[lag:] == owner[:-lag])
        weight = np.full(len(first), 1 - (lag - 1) / lags, dtype=np.float32)
        total = total + sp.csr_matrix((weight, (items[first], items[first + lag])), shape=(size, size))
    return total.tocsr()


def shrunken(counts: sp.csr_matrix, shrinkage: float) -> sp.csr_matrix:
    """Each row of `counts` divided by its sum plus `shrinkage`."""
    support = np.asarray(counts.sum(axis=1)).ravel() + np.float32(shrinkage)
    rows = np.repeat(np.arange(len(support)), np.diff(counts.indptr))
    return sp.csr_matrix((counts.data / support[rows], counts.indices, counts.indptr), counts.shape)


def newest(seen: Sequence[np.ndarray], size: int, count: int = RECENT) -> sp.csr_matrix:
    """float32 [B, size]: weight of each of the `count` newest items, falling linearly; rows sum to 1 (or 0)."""
    recent = [items[-count:][::-1] for items in seen]
    weights = 1 - np.arange(count) / count
    data = [weights[: len(items)] / weights[: len(items)].sum() for items in recent]
    return _rows(recent, data, size)


def ones(items: Sequence[np.ndarray], size: int) -> sp.csr_matrix:
    """float32 [B, size]: 1 for each item of a row."""
    return _rows(items, [np.ones(len(row)) for row in items], size)


def _rows(columns: Sequence[np.ndarray], data: Sequence[np.ndarray], size: int) -> sp.csr_matrix:
    """float32 [B, size] from the columns and entries of each row; a column that stands twice counts twice."""
    indptr = np.cumsum([0, *map(len, columns)])
    indices = np.concatenate([*columns, np.zeros(0)]).astype(np.int32)
    return sp.csr_matrix(
        (np.concatenate([*data, np.zeros(0)]).astype(np.float32), indices, indptr), (len(columns), size)
    )
