"""Popularity over all time, and popularity that forgets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from rporec.baselines.family import Baseline, Parameters, Validation
from rporec.data.slices import rows_of

if TYPE_CHECKING:
    from rporec.data import Dataset

HALF_LIVES = (1.0, 1 / 3, 1 / 10, 1 / 30, 1 / 100, 1 / 300)  # of the time that the fitted interactions span


@dataclass(frozen=True)
class Popularity:
    """How often each item occurs in the fitted interactions; the same for every user."""

    weights: np.ndarray  # float64 [N]

    @classmethod
    def fit(cls, dataset: Dataset, rows: np.ndarray, half_life: float | None = None) -> Popularity:
        """rows: positions in `dataset.items` that may be used.

        half_life: seconds in which the weight of an interaction halves, None: it never does. Age is
        counted from the last fitted interaction: an exponential forgets all items at one rate, so the
        ranking is the same at every later time and one vector serves all samples.
        """
        weights = None
        if half_life is not None and len(rows):
            times = dataset.timestamps[rows].astype(np.float64)
            weights = np.exp2((times - times.max()) / half_life)
        return cls(np.bincount(dataset.items[rows], weights, len(dataset.catalog)).astype(np.float64))

    def scores(self, dataset: Dataset, samples: np.ndarray) -> np.ndarray:
        return np.broadcast_to(self.weights, (len(samples), len(self.weights)))

    def arrays(self) -> dict[str, np.ndarray]:
        return {"weights": self.weights}


class AllTime:
    """Counts; nothing to tune."""

    name: ClassVar[str] = "popularity"
    random: ClassVar[bool] = False

    def paths(
        self, dataset: Dataset, samples: np.ndarray, validation: Validation, seed: int
    ) -> Iterator[Iterator[tuple[Parameters, Baseline]]]:
        yield iter([({}, self.fit(dataset, samples, {}, seed))])

    def fit(self, dataset: Dataset, samples: np.ndarray, parameters: Parameters, seed: int) -> Popularity:
        return Popularity.fit(dataset, rows_of(dataset, samples))

    def restore(self, dataset: Dataset, arrays: Mapping[str, np.ndarray], parameters: Parameters) -> Popularity:
        return Popularity(arrays["weights"])


class Recent(AllTime):
    """Exponential forgetting; of equal half-lives the longest."""

    name: ClassVar[str] = "recent_popularity"

    def paths(
        self, dataset: Dataset, samples: np.ndarray, validation: Validation, seed: int
    ) -> Iterator[Iterator[tuple[Parameters, Baseline]]]:
        for half_life in HALF_LIVES:
            parameters = {"half_life": half_life}
            yield iter([(parameters, self.fit(dataset, samples, parameters, seed))])

    def fit(self, dataset: Dataset, samples: np.ndarray, parameters: Parameters, seed: int) -> Popularity:
        """half_life: as a share of the fitted time, because data sets span anything from days to decades."""
        rows = rows_of(dataset, samples)
        times = dataset.timestamps[rows]
        span = max(float(times.max() - times.min()), 1.0) if len(rows) else 1.0
        return Popularity.fit(dataset, rows, parameters["half_life"] * span)
