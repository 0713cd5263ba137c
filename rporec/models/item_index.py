"""Maximum inner product search: the k items whose vectors have the largest products with a query.

Exact up to some hundred thousand items. Beyond, an inverted file of FAISS: k-means cells, of which a
query visits the nearest, with one byte a coordinate in them. What it finds is ranked by exact products,
so membership alone is approximate.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    import faiss

Found = tuple[np.ndarray, np.ndarray]  # item indices int64, scores float32; best first, of equals the lower index

EXACT_BELOW = 200_000  # items
THREADS = 1  # of FAISS, so that a replica does not fight for cores
TRAIN = 64  # vectors per cell that k-means reads
VISITED = 0.16  # share of the cells that a query visits; more where a filter thins them out
ADDED = 100_000  # vectors that are padded at once
SELECTIVE = 0.02  # at most this share of the items permitted: to read them all is cheaper than to visit cells


class ItemIndex(Protocol):
    """N items as vectors; frozen."""

    @property
    def vectors(self) -> np.ndarray:
        """float32 [N, D]."""
        ...

    def search(self, query: np.ndarray, k: int, mask: np.ndarray | None = None) -> Found:
        """The k best items for `query` [D] of those in `mask`, see `permitted`; fewer only where it has fewer."""
        ...

    def grown(self, vectors: np.ndarray) -> ItemIndex:
        """The same over [N + M, D], whose first N rows are the present ones; builds nothing."""
        ...


def item_index(vectors: np.ndarray, exact_below: int = EXACT_BELOW) -> ItemIndex:
    """The index that suits the number of items; `vectors` (float32 [N, D]) is kept, not copied."""
    return ExactIndex(vectors) if len(vectors) < exact_below else ApproximateIndex.build(vectors)


def permitted(size: int, allowed: np.ndarray | None, excluded: np.ndarray | None) -> np.ndarray | None:
    """bool [size] of the items that are `allowed` (bool [size], None: all) and not `excluded` (item indices,
    repeats are fine); None where that is all of them.

    Raises ValueError when `allowed` has another size.
    """
    if allowed is not None and allowed.shape != (size,):
        raise ValueError(f"allowed: shape {allowed.shape} for a catalogue of {size} items")
    if excluded is None or not len(excluded):
        return allowed
    mask = np.ones(size, dtype=bool) if allowed is None else allowed.copy()
    mask[excluded] = False
    return mask


def top_k(scores: np.ndarray, k: int) -> np.ndarray:
    """Places of the k highest of `scores` [M], best first, of equals the lower place; -inf never. int64."""
    k = min(k, len(scores))
    if k <= 0:
        return np.zeros(0, dtype=np.int64)
    chosen = np.flatnonzero(scores >= np.partition(scores, len(scores) - k)[len(scores) - k])
    chosen = chosen[np.argsort(-scores[chosen], kind="stable")[:k]]
    return chosen[scores[chosen] > -np.inf]


def exact(vectors: np.ndarray, query: np.ndarray, k: int, mask: np.ndarray | None) -> Found:
    """The k best of the items in `mask` (bool [N], None: all)."""
    if mask is not None and 4 * np.count_nonzero(mask) < len(mask):
        return _among(vectors, query, k, np.flatnonzero(mask))  # fewer rows to read, though scattered
    scores = vectors @ query
    items = top_k(scores if mask is None else np.where(mask, scores, np.float32(-np.inf)), k)
    return items, scores[items]


def _among(vectors: np.ndarray, query: np.ndarray, k: int, items: np.ndarray) -> Found:
    """The k best of `items`, int64, ascending."""
    scores = vectors[items] @ query
    best = top_k(scores, k)
    return items[best], scores[best]


def _padded(vectors: np.ndarray) -> np.ndarray:
    """With zeros up to a multiple of 16 coordinates: for other widths FAISS has no vector instructions."""
    return np.pad(vectors, ((0, 0), (0, -vectors.shape[1] % 16)))


@dataclass(frozen=True)
class ExactIndex:
    vectors: np.ndarray

    def search(self, query: np.ndarray, k: int, mask: np.ndarray | None = None) -> Found:
        return exact(self.vectors, query, k, mask)

    def grown(self, vectors: np.ndarray) -> ExactIndex:
        return ExactIndex(vectors)


@dataclass(frozen=True)
class ApproximateIndex:
    """An inverted file over the first items; those that have joined since stand behind them and are all read."""

    vectors: np.ndarray
    cells: faiss.IndexIVF

    @classmethod
    def build(cls, vectors: np.ndarray, *, seed: int = 0) -> ApproximateIndex:
        """The same vectors and seed make the same index."""
        import faiss

        faiss.omp_set_num_threads(THREADS)
        size, number = len(vectors), max(1, round(2 * len(vectors) ** 0.5))
        dim = _padded(vectors[:1]).shape[1]
        cells = faiss.index_factory(dim, f"IVF{number},SQ8", faiss.METRIC_INNER_PRODUCT)
        cells.cp.seed, cells.cp.max_points_per_centroid, cells.cp.min_points_per_centroid = seed, TRAIN, 1
        read = np.random.default_rng(seed).choice(size, min(size, TRAIN * number), replace=False)
        cells.train(_padded(vectors[np.sort(read)]))
        for start in range(0, size, ADDED):
            cells.add(_padded(vectors[start : start + ADDED]))
        return cls(vectors, cells)

    def search(self, query: np.ndarray, k: int, mask: np.ndarray | None = None) -> Found:
        size = len(self.vectors)
        share = 1.0 if mask is None else np.count_nonzero(mask) / size
        wanted = 2 * k + 100
        if share * size <= max(wanted, SELECTIVE * size):
            return exact(self.vectors, query, k, mask)
        old = self._visit(query, wanted, mask, share)
        if len(old) < wanted:  # little near the query is permitted
            return exact(self.vectors, query, k, mask)
        joined = np.arange(self.cells.ntotal, size)
        items = np.concatenate([np.sort(old), joined if mask is None else joined[mask[joined]]])
        return _among(self.vectors, query, k, items)

    @property
    def nbytes(self) -> int:
        """Of the inverted file, without `vectors`."""
        entry = self.cells.code_size + 8  # codes, and an int64 for the item
        return self.cells.ntotal * entry + 4 * self.cells.nlist * self.cells.d

    def grown(self, vectors: np.ndarray) -> ApproximateIndex:
        return replace(self, vectors=vectors)

    def _visit(self, query: np.ndarray, wanted: int, mask: np.ndarray | None, share: float) -> np.ndarray:
        """At most `wanted` items of the cells near the query, int64."""
        import faiss

        faiss.omp_set_num_threads(THREADS)  # holds for the calling thread alone
        visited = int(np.ceil(self.cells.nlist * min(1, VISITED / share**0.25)))
        parameters = faiss.SearchParametersIVF(nprobe=visited)
        if mask is not None:
            parameters.sel = faiss.IDSelectorBitmap(np.packbits(mask[: self.cells.ntotal], bitorder="little"))
        _, items = self.cells.search(_padded(query[None]), wanted, params=parameters)
        return items[0][items[0] >= 0]
