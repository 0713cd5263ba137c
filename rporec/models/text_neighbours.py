"""Which items are near each other by their text: TF-IDF cosines, and how newcomers join them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import scipy.sparse as sp

NEIGHBOURS = 200  # kept per item
WORD = re.compile(r"\w+")
BLOCK = 512  # rows of cosines that are dense at once


@dataclass(frozen=True)
class TextVectors:
    """TF-IDF of N items' texts, rows of norm 1 (or 0). How rare a word is was counted by `fit`, for good."""

    words: dict[str, int]  # word -> column
    idf: np.ndarray  # float64 [W], 1 + ln((1 + texts) / (1 + texts with the word))
    unseen_idf: float  # of a word that no text of `fit` holds
    vectors: sp.csr_matrix  # float32 [N, W], (1 + ln count) * idf

    @classmethod
    def fit(cls, texts: Sequence[str]) -> TextVectors:
        words: dict[str, int] = {}
        counts = _counts(texts, words)
        frequency = np.bincount(counts.indices, minlength=len(words))
        idf = 1 + np.log((1 + len(texts)) / (1 + frequency))
        return cls(words, idf, float(1 + np.log(1 + len(texts))), _weighted(counts, idf))

    def neighbours(self, keep: int = NEIGHBOURS) -> sp.csr_matrix:
        """float32 [N, N]: cosine of each item with its `keep` nearest others and what ties with the last, 0 elsewhere."""
        size = self.vectors.shape[0]
        blocks = [_nearest(block, keep) for _, block in _cosines(self.vectors, 0)]
        return sp.vstack(blocks, format="csr") if blocks else sp.csr_matrix((size, size), dtype=np.float32)

    def join(
        self, texts: Sequence[str], neighbours: sp.csr_matrix, keep: int = NEIGHBOURS
    ) -> tuple[TextVectors, sp.csr_matrix]:
        """With M newcomers behind the N items: the vectors of all, and `neighbours` [N, N] grown to [N + M, N + M].

        A newcomer gets its `keep` nearest, and what ties with the last. An old item keeps all of its
        neighbours, and gains the newcomers that are no farther than the farthest of them.
        """
        words = dict(self.words)
        counts = _counts(texts, words)
        idf = np.pad(self.idf, (0, len(words) - len(self.idf)), constant_values=self.unseen_idf)
        old, size = self.vectors.shape[0], self.vectors.shape[0] + len(texts)
        vectors = sp.vstack([widened(self.vectors, old, len(words)), _weighted(counts, idf)], format="csr")
        farthest = _farthest(neighbours, keep)
        extra = sp.csr_matrix((size, size), dtype=np.float32)
        for first, block in _cosines(vectors, old):
            nearest = _nearest(block, keep).tocoo()
            newcomer, item = np.nonzero((block[:, :old] > 0) & (block[:, :old] >= farthest))
            rows = np.concatenate([first + nearest.row, item])
            columns = np.concatenate([nearest.col, first + newcomer])
            data = np.concatenate([nearest.data, block[newcomer, item]])
            extra = extra + sp.csr_matrix((data, (rows, columns)), shape=(size, size))
        return replace(self, words=words, idf=idf, vectors=vectors), widened(neighbours, size, size) + extra

    def take(self, rows: np.ndarray) -> TextVectors:
        """The items `rows`, in that order."""
        return replace(self, vectors=self.vectors[rows])


def _counts(texts: Sequence[str], words: dict[str, int]) -> sp.csr_matrix:
    """float64 [texts, words]: how often each text has each word; new words get the next columns of `words`."""
    indices: list[int] = []
    data: list[int] = []
    indptr = [0]
    for text in texts:
        counts = Counter(WORD.findall(text.lower()))
        indices += [words.setdefault(word, len(words)) for word in counts]
        data += counts.values()
        indptr.append(len(indices))
    return sp.csr_matrix((np.array(data, np.float64), np.array(indices, np.int32), indptr), (len(texts), len(words)))


def _weighted(counts: sp.csr_matrix, idf: np.ndarray) -> sp.csr_matrix:
    data = (1 + np.log(counts.data)) * idf[counts.indices]
    row = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))
    norm = np.sqrt(np.bincount(row, data**2, minlength=counts.shape[0]))
    return sp.csr_matrix(((data / norm[row]).astype(np.float32), counts.indices, counts.indptr), counts.shape)


def _cosines(vectors: sp.csr_matrix, start: int) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, float32 [rows, N], 0 for an item with itself) of the rows from `start` on."""
    size = vectors.shape[0]
    columns = vectors.T.tocsr()
    for first in range(start, size, BLOCK):
        block = (vectors[first : first + BLOCK] @ columns).toarray()
        block[np.arange(len(block)), first + np.arange(len(block))] = 0
        yield first, block


def _nearest(cosines: np.ndarray, keep: int) -> sp.csr_matrix:
    """The `keep` largest of each row, and what equals the last of them."""
    size = cosines.shape[1]
    if keep < size:
        threshold = np.partition(cosines, size - keep, axis=1)[:, size - keep]
        cosines = np.where(cosines < threshold[:, None], 0, cosines)
    return sp.csr_matrix(cosines)


def _farthest(neighbours: sp.csr_matrix, keep: int) -> np.ndarray:
    """float32 [N]: the smallest cosine of each item that has all its neighbours, 0 of one that has room."""
    full = np.diff(neighbours.indptr) >= keep
    result = np.zeros(len(full), dtype=np.float32)
    row = np.repeat(np.arange(len(full)), np.diff(neighbours.indptr))
    result[full] = 1
    np.minimum.at(result, row, neighbours.data)
    return result


def widened(matrix: sp.csr_matrix, rows: int, columns: int) -> sp.csr_matrix:
    """`matrix` with empty rows and columns behind it; shares its entries."""
    indptr = np.pad(matrix.indptr, (0, rows - matrix.shape[0]), mode="edge")
    return sp.csr_matrix((matrix.data, matrix.indices, indptr), shape=(rows, columns))
