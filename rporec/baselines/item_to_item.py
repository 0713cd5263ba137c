"""Baselines whose score is linear in the history: ItemKNN, EASE, sequential rules, text neighbours.

Each makes one matrix that says what a history item speaks for; what they share is how a history is
weighed, and that is tuned with them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import scipy.sparse as sp
from scipy.linalg import lapack

from rporec.baselines.family import Baseline, Parameters, Validation
from rporec.data.slices import rows_of
from rporec.models.text_neighbours import TextVectors
from rporec.models.transitions import newest, ones, shrunken, transitions

if TYPE_CHECKING:
    from rporec.data import Dataset

EVERY = 0  # as `recent`: every item of the history counts 1
EASE_ITEMS = 20_000  # more need a dense matrix of more than 3 GB


@dataclass(frozen=True)
class ItemToItem:
    """scores = weights of the history items [B, N] @ matrix [N, N]."""

    matrix: sp.csr_matrix | np.ndarray  # float32, row j: what j in the history says of every item
    recent: int  # newest items that count, their weights falling linearly; or EVERY

    def scores(self, dataset: Dataset, samples: np.ndarray) -> np.ndarray:
        seen, size = dataset.seen_of(samples), self.matrix.shape[0]
        if self.recent == EVERY:
            history = ones([np.unique(items) for items in seen], size)
        else:
            history = newest(seen, size, self.recent)
        result = history @ self.matrix
        return result.toarray() if sp.issparse(result) else result

    def arrays(self) -> dict[str, np.ndarray]:
        if isinstance(self.matrix, np.ndarray):
            return {"matrix": self.matrix}
        data, indices, indptr = self.matrix.data, self.matrix.indices, self.matrix.indptr
        return {"data": data, "indices": indices.astype(np.int32), "indptr": indptr.astype(np.int64)}


class LinearFamily:
    """A grid over how the matrix is made, and within it over `recent`."""

    name: ClassVar[str]
    random: ClassVar[bool] = False
    recents: ClassVar[tuple[int, ...]]

    def matrices(
        self, dataset: Dataset, samples: np.ndarray, choices: Parameters | None
    ) -> Iterator[tuple[Parameters, Any]]:
        """(parameters, matrix) of the whole grid, or of `choices` alone."""
        raise NotImplementedError

    def paths(
        self, dataset: Dataset, samples: np.ndarray, validation: Validation, seed: int
    ) -> Iterator[Iterator[tuple[Parameters, Baseline]]]:
        for parameters, matrix in self.matrices(dataset, samples, None):
            for recent in self.recents:
                yield iter([({**parameters, "recent": recent}, ItemToItem(matrix, recent))])

    def fit(self, dataset: Dataset, samples: np.ndarray, parameters: Parameters, seed: int) -> ItemToItem:
        ((_, matrix),) = self.matrices(dataset, samples, parameters)
        return ItemToItem(matrix, parameters["recent"])

    def restore(self, dataset: Dataset, arrays: Mapping[str, np.ndarray], parameters: Parameters) -> ItemToItem:
        if "matrix" in arrays:
            return ItemToItem(arrays["matrix"], parameters["recent"])
        size = len(arrays["indptr"]) - 1
        matrix: Any = sp.csr_matrix((arrays["data"], arrays["indices"], arrays["indptr"]), shape=(size, size))
        return ItemToItem(matrix, parameters["recent"])


class ItemKNN(LinearFamily):
    """Shrunken cosine of the items' users: c_ij / (sqrt(n_i n_j) + shrinkage), the nearest of each item.

    `itself`: a history item is its own neighbour too, for data in which users come back.
    Sarwar et al. 2001, "Item-based collaborative filtering"; shrinkage: Bell and Koren 2007.
    """

    name: ClassVar[str] = "itemknn"
    recents: ClassVar[tuple[int, ...]] = (EVERY, 5, 20)
    shrinkages: ClassVar[tuple[float, ...]] = (1.0, 10.0, 100.0)
    neighbours: ClassVar[tuple[int, ...]] = (50, 200)

    def matrices(
        self, dataset: Dataset, samples: np.ndarray, choices: Parameters | None
    ) -> Iterator[tuple[Parameters, Any]]:
        taken = _taken(dataset, samples)
        common = (taken.T @ taken).tocsr()
        counts = common.diagonal()
        rows = np.repeat(np.arange(len(counts)), np.diff(common.indptr))
        grid: list[Parameters] = [
            {"shrinkage": shrinkage, "neighbours": count, "itself": itself}
            for shrinkage, count, itself in product(self.shrinkages, self.neighbours, (False, True))
        ]
        for parameters in grid if choices is None else [choices]:
            norm = np.sqrt(counts[rows] * counts[common.indices]) + parameters["shrinkage"]
            cosine = np.where((rows != common.indices) | parameters["itself"], common.data / norm, 0)
            near = sp.csr_matrix((cosine, common.indices, common.indptr), common.shape)
            # The nearest of the item that is scored: an item with many users would else speak for everything.
            yield parameters, _strongest(near, parameters["neighbours"]).T.tocsr().astype(np.float32)


class EASE(LinearFamily):
    """B = I - P / diag(P), P = (X'X + penalty I)^-1; Steck 2019, arXiv 1905.03375, eq. 8."""

    name: ClassVar[str] = "ease"
    recents: ClassVar[tuple[int, ...]] = (EVERY, 5, 20)
    penalties: ClassVar[tuple[float, ...]] = (20.0, 100.0, 300.0, 1000.0)

    def matrices(
        self, dataset: Dataset, samples: np.ndarray, choices: Parameters | None
    ) -> Iterator[tuple[Parameters, Any]]:
        taken = _taken(dataset, samples).astype(np.float64)
        gram = (taken.T @ taken).toarray()
        for parameters in [{"penalty": p} for p in self.penalties] if choices is None else [choices]:
            system = gram.copy()
            system[np.diag_indices_from(system)] += parameters["penalty"]
            yield parameters, _zero_diagonal_regression(system)


class Rules(LinearFamily):
    """Decayed transitions between the items of a user, divided by how often the first one was left.

    Ludewig and Jannach 2018, "Evaluation of session-based recommendation algorithms", sequential rules.
    """

    name: ClassVar[str] = "rules"
    recents: ClassVar[tuple[int, ...]] = (1, 3, 5, 10, 20)
    lags: ClassVar[tuple[int, ...]] = (3, 10, 30)
    shrinkages: ClassVar[tuple[float, ...]] = (0.5, 5.0, 50.0)

    def matrices(
        self, dataset: Dataset, samples: np.ndarray, choices: Parameters | None
    ) -> Iterator[tuple[Parameters, Any]]:
        rows = rows_of(dataset, samples)
        for lags in self.lags if choices is None else [choices["lags"]]:
            counts = transitions(dataset, rows, lags)
            for shrinkage in self.shrinkages if choices is None else [choices["shrinkage"]]:
                yield {"lags": lags, "shrinkage": shrinkage}, shrunken(counts, shrinkage)


class TextKNN(LinearFamily):
    """TF-IDF cosine with the newest items; `itself`: a history item is its own neighbour, with cosine 1."""

    name: ClassVar[str] = "text_knn"
    recents: ClassVar[tuple[int, ...]] = (1, 2, 3, 5, 10, 20)

    def matrices(
        self, dataset: Dataset, samples: np.ndarray, choices: Parameters | None
    ) -> Iterator[tuple[Parameters, Any]]:
        size = len(dataset.catalog)
        near = TextVectors.fit(dataset.catalog.texts()).neighbours()
        for itself in (False, True) if choices is None else [choices["itself"]]:
            yield {"itself": itself}, near + sp.eye(size, format="csr", dtype=np.float32) if itself else near


def _taken(dataset: Dataset, samples: np.ndarray) -> sp.csr_matrix:
    """float32 [users, N]: 1 where a user took an item."""
    rows = rows_of(dataset, samples)
    shape = len(dataset.user_ids), len(dataset.catalog)
    taken = sp.csr_matrix((np.ones(len(rows), np.float32), (dataset.owner[rows], dataset.items[rows])), shape=shape)
    taken.data[:] = 1  # however often
    return taken


def _strongest(matrix: sp.csr_matrix, count: int) -> sp.csr_matrix:
    """The `count` largest entries of each row; of equals those of lower columns."""
    rows = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    order = np.lexsort((matrix.indices, -matrix.data, rows))
    place = np.arange(len(order)) - matrix.indptr[rows[order]]
    kept = order[place < count]
    return sp.csr_matrix((matrix.data[kept], (rows[kept], matrix.indices[kept])), shape=matrix.shape)


def _zero_diagonal_regression(system: np.ndarray) -> np.ndarray:
    """float32 -P / diag(P) by columns with a diagonal of 0, for P the inverse of a positive definite matrix."""
    factor, failed = lapack.dpotrf(system, lower=False, overwrite_a=True)
    inverse, failed_too = lapack.dpotri(factor, lower=False, overwrite_c=True)
    if failed or failed_too:
        raise np.linalg.LinAlgError("EASE: the Gram matrix is not positive definite")
    inverse = np.triu(inverse)
    inverse += np.triu(inverse, 1).T
    weights = (-inverse / np.diag(inverse)).astype(np.float32)
    np.fill_diagonal(weights, 0)
    return weights
