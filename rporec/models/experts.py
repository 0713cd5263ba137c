"""Simple recommenders that stand beside the RecHead's networks, each joined by one scalar.

`Experts` computes what transition rules, text neighbours and popularity say about every item;
`search_weights` finds the scalars. Nothing here is trained by gradient: cross entropy picks worse
scalars than a search on the ranking metric itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp

from rporec.evaluation.cold import rows_of as rows_of
from rporec.evaluation.ranking import ndcg, ranks
from rporec.models.head_inputs import HeadInputs

if TYPE_CHECKING:
    from rporec.data import Catalog, Dataset

LAGS = 10  # farthest pair of a user's interactions that makes a rule
RECENT = 5  # newest history items that rules and neighbours start from, weights falling linearly
SHRINKAGE = 5.0  # added to a rule's support, so that one lucky pair is no certainty
TINY = 1e-12  # keeps a row of zeros from being divided by zero
NEIGHBOURS = 200  # text neighbours kept per item
FRESH_SHARES = {"popularity_fast": 0.02, "popularity": 0.2}  # the half-life holds this share of interactions
GRID = (0.0, *(2.0**power for power in range(-5, 6)))
REFINE = (0.5, 0.7, 0.85, 1.2, 1.4)  # of the present scalar, tried beside the grid
CANDIDATES = 40  # best items of each component per sample that the search ranks
ABSENT = -1e9  # score of a candidate slot that a row does not need


@dataclass(frozen=True)
class Experts:
    """Fitted on some interactions and frozen; N items."""

    rules: sp.csr_matrix  # float32 [N, N], row j: how often i follows j, weight 1 at distance 1 down to 1 / LAGS
    neighbours: sp.csr_matrix  # float32 [N, N], TF-IDF cosine of the texts, 0 on the diagonal
    items: np.ndarray  # int32 [I], interactions in time order
    times: np.ndarray  # int64 [I], seconds
    half_lives: dict[str, float]  # seconds

    @property
    def names(self) -> tuple[str, ...]:
        return ("rules", "text_knn", *self.half_lives, "in_history", "last_item")

    @classmethod
    def fit(cls, dataset: Dataset, rows: np.ndarray) -> Experts:
        """rows: positions in `dataset.items` that may be used, ascending (see `rows_of`)."""
        order = np.argsort(dataset.timestamps[rows], kind="stable")
        times = dataset.timestamps[rows][order]
        age = (times[-1] - times).astype(np.float64) if len(times) else np.ones(1)
        half_lives = {name: max(float(np.quantile(age, share)), 1.0) for name, share in FRESH_SHARES.items()}
        return cls(
            _transitions(dataset, rows),
            text_neighbours(dataset.catalog),
            dataset.items[rows][order].astype(np.int32),
            times.astype(np.int64),
            half_lives,
        )

    def features(self, inputs: HeadInputs) -> dict[str, np.ndarray]:
        """What each expert says: name -> float32 [B, N], from 0 to 1, 1 the most."""
        recent = _recent(inputs.seen, self.rules.shape[0])
        surprise = (recent.multiply(1 / self._support).tocsr() @ self.rules).toarray()
        surprise = np.log1p(surprise / np.maximum(surprise.mean(axis=1, keepdims=True), TINY))
        result = {"rules": _relative(surprise), "text_knn": (recent @ self.neighbours).toarray()}
        for name, half_life in self.half_lives.items():
            result[name] = _relative(self._popularity(inputs.time, half_life))
        result["in_history"], result["last_item"] = _history(inputs.seen, self.rules.shape[0])
        return result

    @cached_property
    def _support(self) -> np.ndarray:
        return np.asarray(self.rules.sum(axis=1)).ravel() + SHRINKAGE

    def _popularity(self, times: np.ndarray, half_life: float) -> np.ndarray:
        """Interactions strictly before each time, halved for each half-life of age; float32 [B, N].

        Age counts from the newest of them: a row is divided by its maximum, so silence since then
        would cancel, or underflow.
        """
        ends, row = np.unique(np.searchsorted(self.times, times, side="left"), return_inverse=True)
        state, start, last = np.zeros(self.rules.shape[0]), 0, 0
        table = np.zeros((len(ends), len(state)), dtype=np.float32)
        for number, end in enumerate(ends):
            if end > start:
                now = int(self.times[end - 1])
                state *= np.exp2(-(now - last) / half_life) if start else 0.0
                np.add.at(state, self.items[start:end], np.exp2(-(now - self.times[start:end]) / half_life))
                start, last = end, now
            table[number] = state
        return table[row]

    def with_catalog(self, catalog: Catalog, rows: np.ndarray) -> Experts:
        """The same experts over a larger catalogue; `rows[i]` is the new index of the old item i."""
        rules = self.rules.tocoo()
        size = len(catalog)
        moved = sp.csr_matrix((rules.data, (rows[rules.row], rows[rules.col])), shape=(size, size), dtype=np.float32)
        return replace(self, rules=moved, neighbours=text_neighbours(catalog), items=rows[self.items].astype(np.int32))

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything but `half_lives` as plain arrays, for `from_arrays`."""
        result = {"items": self.items, "times": self.times}
        for name, matrix in (("rules", self.rules), ("neighbours", self.neighbours)):
            result |= {
                f"{name}.data": matrix.data.astype(np.float32),
                f"{name}.indices": matrix.indices.astype(np.int32),
                f"{name}.indptr": matrix.indptr.astype(np.int64),
            }
        return result

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], half_lives: dict[str, float]) -> Experts:
        def matrix(name: str) -> sp.csr_matrix:
            data, indices, indptr = (arrays[f"{name}.{part}"] for part in ("data", "indices", "indptr"))
            return sp.csr_matrix((data, indices, indptr), shape=(len(indptr) - 1, len(indptr) - 1))

        return cls(matrix("rules"), matrix("neighbours"), arrays["items"], arrays["times"], dict(half_lives))


def _transitions(dataset: Dataset, rows: np.ndarray) -> sp.csr_matrix:
    owner = np.repeat(np.arange(len(dataset.user_ids)), np.diff(dataset.offsets))[rows]
    items = dataset.items[rows]
    size = len(dataset.catalog)
    total = sp.csr_matrix((size, size), dtype=np.float32)
    for lag in range(1, LAGS + 1):
        first = np.flatnonzero(owner[lag:] == owner[:-lag])
        weight = np.full(len(first), 1 - (lag - 1) / LAGS, dtype=np.float32)
        total = total + sp.csr_matrix((weight, (items[first], items[first + lag])), shape=(size, size))
    return total.tocsr()


def text_neighbours(catalog: Catalog, keep: int = NEIGHBOURS) -> sp.csr_matrix:
    """float32 [N, N]: TF-IDF cosine of each item with its `keep` nearest others, 0 elsewhere."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    size = len(catalog)
    texts = [catalog.text(item) for item in range(size)]
    if not any(text.strip() for text in texts):
        return sp.csr_matrix((size, size), dtype=np.float32)
    vectoriser = TfidfVectorizer(token_pattern=r"(?u)\w+", sublinear_tf=True, dtype=np.float32)
    vectors = vectoriser.fit_transform(texts)
    blocks = []
    for start in range(0, size, 512):
        block = (vectors[start : start + 512] @ vectors.T).toarray()
        block[np.arange(len(block)), start + np.arange(len(block))] = 0
        if keep < size:
            threshold = np.partition(block, size - keep, axis=1)[:, size - keep]
            block[block < threshold[:, None]] = 0
        blocks.append(sp.csr_matrix(block))
    return sp.vstack(blocks, format="csr", dtype=np.float32)


def _recent(seen: Sequence[np.ndarray], size: int) -> sp.csr_matrix:
    """float32 [B, N]: weight of each newest history item, rows sum to 1 (or 0 without a history)."""
    newest = [items[-RECENT:][::-1] for items in seen]
    lengths = np.array([len(items) for items in newest])
    weights = 1 - np.arange(RECENT) / RECENT
    data = np.concatenate([weights[:n] / weights[:n].sum() for n in lengths] or [weights[:0]])
    columns = np.concatenate(newest or [np.zeros(0, np.int32)])
    rows = np.repeat(np.arange(len(newest)), lengths)
    return sp.csr_matrix((data.astype(np.float32), (rows, columns)), shape=(len(newest), size))


def _history(seen: Sequence[np.ndarray], size: int) -> tuple[np.ndarray, np.ndarray]:
    known, last = np.zeros((2, len(seen), size), dtype=np.float32)
    for row, items in enumerate(seen):
        known[row, items] = 1
        last[row, items[-1:]] = 1
    return known, last


def _relative(values: np.ndarray) -> np.ndarray:
    """Each row divided by its maximum."""
    return (values / np.maximum(values.max(axis=1, keepdims=True), TINY)).astype(np.float32)


def search_weights(
    components: Mapping[str, np.ndarray],
    targets: np.ndarray,
    exclude: Sequence[np.ndarray] | None = None,
    *,
    sweeps: int = 5,
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
    found = [_ascend(start, table, absent, value, sweeps) for start in (alone, np.ones(len(table)))]
    weights = max(found, key=lambda pair: pair[1])[0] / np.where(units > 0, units, np.inf)
    weights /= weights[weights > 0].max() if weights.any() else 1
    total = np.zeros(next(iter(components.values())).shape, dtype=np.float32)
    for weight, part in zip(weights, components.values(), strict=True):
        total += np.float32(weight) * part
    best = float(ndcg(ranks(total, targets, exclude), 10).mean())
    return {name: float(weight) for name, weight in zip(components, weights, strict=True)}, best


def _ascend(
    weights: np.ndarray, table: np.ndarray, absent: np.ndarray, value: Callable[[np.ndarray], float], sweeps: int
) -> tuple[np.ndarray, float]:
    weights = weights.copy()
    best = value(np.tensordot(weights.astype(np.float32), table, 1) + absent)
    for _ in range(sweeps):
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
