"""Simple recommenders that stand beside the RecHead's networks, each joined by one scalar.

`Experts` computes what transition rules, text neighbours and popularity say about every item; nothing
here is trained by gradient. `weight_search` finds the scalars.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp

from rporec.models.head_inputs import HeadInputs
from rporec.models.reranker import Reranker
from rporec.models.text_neighbours import TextVectors, widened
from rporec.models.transitions import newest, ones, shrunken, transitions

if TYPE_CHECKING:
    from rporec.data import Catalog, Dataset

LONG = 10  # newest history items that the linear rules start from; the other experts RECENT
SHRINKAGE = 5.0  # added to a rule's support, so that one lucky pair is no certainty
LINEAR_SHRINKAGE = 50.0  # the same for the linear rules
TINY = 1e-12  # keeps a row of zeros from being divided by zero
FRESH_SHARES = {"popularity_fast": 0.02, "popularity": 0.2}  # the half-life holds this share of interactions
SILENT = ("rules", "rules_linear", "text_knn", "text_newest", "in_history", "last_item")  # about most items
RERANKER = "reranker."  # prefix of its parameters' names among the arrays
HAIR = 1e-4  # of the scalar of the reranker, to which a thousandth of a nat is worth as much


@dataclass(frozen=True)
class Experts:
    """Fitted on some interactions and frozen; N items."""

    rules: sp.csr_matrix  # float32 [N, N], row j: how often i follows j, weight 1 at distance 1 down to 1 / LAGS
    pairs: sp.csr_matrix  # float32 [N, N], row j: how often i comes right after j
    neighbours: sp.csr_matrix  # float32 [N, N], TF-IDF cosine of the texts, 0 on the diagonal
    items: np.ndarray  # int32 [I], interactions in time order
    times: np.ndarray  # int64 [I], seconds
    half_lives: dict[str, float]  # seconds
    fitted: int  # items at the time; those that joined later have no rules and do not change their scale
    texts: TextVectors | None = field(default=None, repr=False)  # what newcomers are compared with, once there are any
    reranker: Reranker | None = None  # one expert more, which reads what the others say

    @property
    def names(self) -> tuple[str, ...]:
        counted = ("rules", "rules_linear", "text_knn", "text_newest", *self.half_lives, "in_history", "last_item")
        return (*counted, "reranked") if self.reranker else counted

    @property
    def joined(self) -> tuple[str, ...]:
        """Those that a search is to weigh: all, or the reranker alone, which has read the others.

        Weighed beside it they fit the window that is searched on, and cost more on the next than they gain.
        """
        return ("reranked",) if self.reranker else self.names

    @classmethod
    def fit(cls, dataset: Dataset, rows: np.ndarray) -> Experts:
        """rows: positions in `dataset.items` that may be used, ascending (see `rows_of`)."""
        return cls._counted(dataset, rows, TextVectors.fit(dataset.catalog.texts()).neighbours())

    def refitted(self, dataset: Dataset, rows: np.ndarray) -> Experts:
        """`fit` on other rows of the same data set; the reranker stays as it is."""
        return replace(self._counted(dataset, rows, self.neighbours), reranker=self.reranker)

    def stacked(self, dataset: Dataset, samples: np.ndarray, *, seed: int = 0) -> Experts:
        """These with a reranker that learned from `samples`; see `Reranker.fit`."""
        return replace(self, reranker=Reranker.fit(dataset, samples, self, seed=seed))

    @classmethod
    def _counted(cls, dataset: Dataset, rows: np.ndarray, neighbours: sp.csr_matrix) -> Experts:
        order = np.argsort(dataset.timestamps[rows], kind="stable")
        times = dataset.timestamps[rows][order]
        age = (times[-1] - times).astype(np.float64) if len(times) else np.ones(1)
        return cls(
            transitions(dataset, rows),
            transitions(dataset, rows, lags=1),
            neighbours,
            dataset.items[rows][order].astype(np.int32),
            times.astype(np.int64),
            {name: max(float(np.quantile(age, share)), 1.0) for name, share in FRESH_SHARES.items()},
            len(dataset.catalog),
        )

    def whole(self, weights: Mapping[str, float]) -> dict[str, float]:
        """The scalars of a search, and a hair of popularity beside a reranker: it is silent beyond its candidates,
        where filters and long lists would else meet nothing but ties."""
        return {**weights, "popularity": HAIR * weights["reranked"]} if self.reranker else dict(weights)

    def features(self, inputs: HeadInputs, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """What experts say, `names` or all of them: name -> float32 [B, N], from 0 to 1, 1 the most."""
        names = self.names if names is None else names
        sparse = self.sparse(inputs, names)
        shared, which = self.shared(inputs.time, names)
        return {name: shared[name][which] if name in shared else sparse[name].toarray() for name in names}

    def weigh(self, inputs: HeadInputs, weights: Mapping[str, float]) -> WeightedExperts:
        """Their sum, each times its weight (missing: 0)."""
        used = {name: np.float32(weights[name]) for name in self.names if weights.get(name)}
        sparse = self.sparse(inputs, used)
        for name, part in sparse.items():
            part.data *= used[name]
        parts, which = self.shared(inputs.time, used)
        shared = np.zeros((which.max(initial=-1) + 1, self.rules.shape[0]), dtype=np.float32)
        for name, table in parts.items():
            shared += used[name] * table
        return WeightedExperts(tuple(sparse.values()), shared, which)

    def sparse(self, inputs: HeadInputs, names: Collection[str] = SILENT) -> dict[str, sp.csr_matrix]:
        """Those of the experts `names` that are silent about most items: name -> float32 [B, N]."""
        if self.reranker and "reranked" in names:
            counted = self.sparse(inputs)
            result = {name: part for name, part in counted.items() if name in names}
            return {**result, "reranked": self.reranker.apply(self, inputs, counted)}
        size = self.rules.shape[0]
        result = {}
        recent = newest(inputs.seen, size)
        if "rules" in names:
            over_support = sp.csr_matrix(
                (recent.data / self._support[recent.indices], recent.indices, recent.indptr), recent.shape
            )
            result["rules"] = _surprise(over_support @ self.rules, self.fitted)
        if "rules_linear" in names:
            result["rules_linear"] = self.linear_rules(inputs, LONG)
        if "text_knn" in names:
            result["text_knn"] = recent @ self.neighbours
        if "text_newest" in names:
            result["text_newest"] = newest(inputs.seen, size, 1) @ self.neighbours
        if "in_history" in names:
            result["in_history"] = ones([np.unique(items) for items in inputs.seen], size)
        if "last_item" in names:
            result["last_item"] = ones([items[-1:] for items in inputs.seen], size)
        return result

    def linear_rules(self, inputs: HeadInputs, count: int) -> sp.csr_matrix:
        """float32 [B, N]: those of the `count` newest items."""
        return newest(inputs.seen, self.rules.shape[0], count) @ self._linear_rules

    def shared(
        self, times: np.ndarray, names: Collection[str] = tuple(FRESH_SHARES)
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Popularities among `names`, name -> float32 [T, N] for T different pasts, and the past of each time [B]."""
        ends, which = np.unique(np.searchsorted(self.times, times, side="left"), return_inverse=True)
        if ends.tolist() == [len(self.times)]:  # as serving always asks
            return {name: self._newest[name] for name in self.half_lives if name in names}, which
        return {name: self._popularity(ends, self.half_lives[name]) for name in self.half_lives if name in names}, which

    @cached_property
    def successors(self) -> sp.csr_matrix:
        """float32 [N, N], row j: share of the times that i came right after j, shrunken."""
        return shrunken(self.pairs, SHRINKAGE)

    @property
    def end(self) -> float:
        """Seconds of the newest interaction."""
        return float(self.times[-1]) if len(self.times) else 0.0

    @cached_property
    def lifetimes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(interactions, seconds of the first, of the last) of each item, float64 [N].

        An item without any is about to begin, and was last taken before all others.
        """
        size = self.rules.shape[0]
        first, last = np.full(size, self.end), np.full(size, float(self.times[0]) if len(self.times) else 0.0)
        np.minimum.at(first, self.items, self.times)
        np.maximum.at(last, self.items, self.times)
        return np.bincount(self.items, minlength=size).astype(np.float64), first, last

    @cached_property
    def _newest(self) -> dict[str, np.ndarray]:
        ends = np.array([len(self.times)])
        return {name: self._popularity(ends, half_life) for name, half_life in self.half_lives.items()}

    @cached_property
    def _support(self) -> np.ndarray:
        return np.asarray(self.rules.sum(axis=1)).ravel() + SHRINKAGE

    @cached_property
    def _linear_rules(self) -> sp.csr_matrix:
        return shrunken(self.rules, LINEAR_SHRINKAGE)

    def _popularity(self, ends: np.ndarray, half_life: float) -> np.ndarray:
        """Of the first `end` interactions, halved for each half-life of age, relative to the most popular; [T, N].

        ends: int [T], ascending. Age counts from the newest of them: a row is divided by its maximum, so
        silence since then would cancel, or underflow.
        """
        state, start, last = np.zeros(self.rules.shape[0]), 0, 0
        table = np.zeros((len(ends), len(state)), dtype=np.float32)
        for number, end in enumerate(ends):
            if end > start:
                now = int(self.times[end - 1])
                state *= np.exp2(-(now - last) / half_life) if start else 0.0
                np.add.at(state, self.items[start:end], np.exp2(-(now - self.times[start:end]) / half_life))
                start, last = end, now
            table[number] = state
        return table / np.maximum(table.max(axis=1, keepdims=True), np.float32(TINY))

    def with_catalog(self, catalog: Catalog, rows: np.ndarray) -> Experts:
        """The same experts over a larger catalogue; `rows[i]` is the new index of the old item i.

        Newcomers get text neighbours and become such; between old items nothing changes.
        """
        size = len(catalog)
        new = np.setdiff1d(np.arange(size), rows)
        texts = self.texts or TextVectors.fit([catalog.text(item) for item in rows])
        texts, neighbours = texts.join([catalog.text(item) for item in new], self.neighbours)
        places = np.concatenate([rows, new])
        return replace(
            self,
            rules=_moved(self.rules, rows, size),
            pairs=_moved(self.pairs, rows, size),
            neighbours=_moved(neighbours, places, size),
            items=rows[self.items].astype(np.int32),
            texts=texts.take(np.argsort(places)),
        )

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything but `half_lives` as plain arrays, for `from_arrays`."""
        result = {"items": self.items, "times": self.times, "fitted": np.array(self.fitted)}
        for name, matrix in (("rules", self.rules), ("pairs", self.pairs), ("neighbours", self.neighbours)):
            result |= {
                f"{name}.data": matrix.data.astype(np.float32),
                f"{name}.indices": matrix.indices.astype(np.int32),
                f"{name}.indptr": matrix.indptr.astype(np.int64),
            }
        if self.reranker:
            result |= {RERANKER + name: value for name, value in self.reranker.parameters.items()}
        return result

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], half_lives: dict[str, float]) -> Experts:
        def matrix(name: str) -> sp.csr_matrix:
            data, indices, indptr = (arrays[f"{name}.{part}"] for part in ("data", "indices", "indptr"))
            return sp.csr_matrix((data, indices, indptr), shape=(len(indptr) - 1, len(indptr) - 1))

        learned = {name.removeprefix(RERANKER): value for name, value in arrays.items() if name.startswith(RERANKER)}
        return cls(
            matrix("rules"),
            matrix("pairs"),
            matrix("neighbours"),
            arrays["items"],
            arrays["times"],
            dict(half_lives),
            int(arrays["fitted"]),
            reranker=Reranker(learned) if learned else None,
        )


@dataclass(frozen=True)
class WeightedExperts:
    """Weighted sum of the experts for B samples with T different pasts: that of `sparse`, and `shared[which]`."""

    sparse: tuple[sp.csr_matrix, ...]  # float32 [B, N] each
    shared: np.ndarray  # float32 [T, N], popularity
    which: np.ndarray  # int [B]

    def scores(self) -> np.ndarray:
        """Of the whole catalogue, float32 [B, N]."""
        result = self.shared[self.which]
        for part in self.sparse:
            result += part.toarray()
        return result

    def own(self, sample: int) -> tuple[np.ndarray, np.ndarray]:
        """(items that one sample's history speaks for, int [M], ascending; what `sparse` gives them, float32 [M])."""
        rows = [slice(*part.indptr[sample : sample + 2]) for part in self.sparse]
        found = [part.indices[row] for part, row in zip(self.sparse, rows, strict=True)]
        given = [part.data[row] for part, row in zip(self.sparse, rows, strict=True)]
        items, place = np.unique(np.concatenate([*found, np.zeros(0, np.int32)]), return_inverse=True)
        return items, np.bincount(place, np.concatenate([*given, np.zeros(0)]), len(items)).astype(np.float32)


def _moved(matrix: sp.csr_matrix, places: np.ndarray, size: int) -> sp.csr_matrix:
    """[size, size] with row and column i of `matrix` at `places[i]`."""
    if np.array_equal(places, np.arange(len(places))):
        return widened(matrix, size, size)
    entries = matrix.tocoo()
    return sp.csr_matrix((entries.data, (places[entries.row], places[entries.col])), shape=(size, size))


def _surprise(values: sp.csr_matrix, size: int) -> sp.csr_matrix:
    """ln(1 + x / the mean of a row over `size` items), relative to the row's maximum; 0 stays 0."""
    mean = np.maximum(np.asarray(values.sum(axis=1)).ravel() / size, TINY)
    largest = np.maximum(np.log1p(values.max(axis=1).toarray().ravel() / mean), TINY)
    counts = np.diff(values.indptr)
    data = np.log1p(values.data / np.repeat(mean, counts)) / np.repeat(largest, counts)
    return sp.csr_matrix((data.astype(np.float32), values.indices, values.indptr), values.shape)
