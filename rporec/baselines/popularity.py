"""Popularity over all time, and popularity that forgets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from rporec.evaluation.ranking import ndcg, ranks

if TYPE_CHECKING:
    from rporec.data import Dataset

HALF_LIVES = (1 / 300, 1 / 100, 1 / 30, 1 / 10, 1 / 3, 1.0)  # of the time that the fitted interactions span


class Baseline(Protocol):
    """A fitted recommender. `name` is its row in the table."""

    @property
    def name(self) -> str: ...

    def scores(self, dataset: Dataset, samples: np.ndarray) -> np.ndarray:
        """Finite scores of the whole catalogue for each sample, [B, N]; may be a read-only view."""


@dataclass(frozen=True)
class Popularity:
    """How often each item occurs in the fitted interactions; the same for every user."""

    counts: np.ndarray  # float64 [N]
    name: str = "popularity"

    @classmethod
    def fit(cls, dataset: Dataset, rows: np.ndarray) -> Popularity:
        """rows: positions in `dataset.items` that may be used (`rporec.evaluation.cold.held_rows`)."""
        return cls(np.bincount(dataset.items[rows], minlength=len(dataset.catalog)).astype(np.float64))

    def scores(self, dataset: Dataset, samples: np.ndarray) -> np.ndarray:
        return np.broadcast_to(self.counts, (len(samples), len(self.counts)))


@dataclass(frozen=True)
class RecentPopularity:
    """Interactions counted with a weight that halves every `half_life` seconds of age.

    Age is counted from the last fitted interaction. An exponential forgets all items at one rate, so
    the ranking is the same at every later time and one vector serves all samples.
    """

    weights: np.ndarray  # float64 [N]
    half_life: float  # seconds
    name: str = "recent_popularity"

    @classmethod
    def fit(cls, dataset: Dataset, rows: np.ndarray, half_life: float) -> RecentPopularity:
        """rows: positions in `dataset.items` that may be used; half_life: seconds, > 0."""
        times = dataset.timestamps[rows].astype(np.float64)
        age = times.max() - times if len(rows) else times
        weights = np.bincount(dataset.items[rows], weights=np.exp2(-age / half_life), minlength=len(dataset.catalog))
        return cls(weights, half_life)

    @classmethod
    def select(
        cls,
        dataset: Dataset,
        rows: np.ndarray,
        validation: np.ndarray,
        *,
        exclude_history: bool = True,
        half_lives: Sequence[float] = HALF_LIVES,
    ) -> RecentPopularity:
        """The half-life with the best NDCG@10 on the samples `validation`, the longest of equals.

        half_lives: as fractions of the time from the first to the last of `rows`, because data sets
        span anything from days to decades.
        """
        times = dataset.timestamps[rows]
        span = max(float(times.max() - times.min()), 1.0) if len(rows) else 1.0
        candidates = [cls.fit(dataset, rows, fraction * span) for fraction in sorted(half_lives, reverse=True)]
        targets = dataset.targets(validation)
        seen = [dataset.seen(int(sample)) for sample in validation] if exclude_history else None
        return max(candidates, key=lambda c: float(ndcg(ranks(c.scores(dataset, validation), targets, seen), 10).sum()))

    def scores(self, dataset: Dataset, samples: np.ndarray) -> np.ndarray:
        return np.broadcast_to(self.weights, (len(samples), len(self.weights)))
