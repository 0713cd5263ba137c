"""What every baseline offers, and the one function that chooses its parameters.

A `Family` is a method before it has seen data: it proposes candidates and fits one for good. A
`Baseline` is what a fit leaves behind. All are fitted on all of train, whatever the LLM's slices are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import numpy as np

from rporec.data import Dataset
from rporec.data.slices import evenly_spread
from rporec.evaluation.ranking import ndcg, ranks

CHUNK = 512  # samples scored at once
ROWS = 2000  # of validation that candidates are compared on, evenly spread
PATIENCE = 3  # candidates of a path without a better one before it is left
Parameters = dict[str, Any]  # plain JSON values


class Baseline(Protocol):
    """A fitted recommender."""

    def scores(self, dataset: Dataset, samples: np.ndarray) -> np.ndarray:
        """Finite scores of the whole catalogue for each sample, [B, N]; may be a read-only view."""

    def arrays(self) -> dict[str, np.ndarray]:
        """All of it as plain arrays, for `Family.restore`."""


class Family(Protocol):
    """A method. What it fits on: samples in time order, of which it may use targets and histories."""

    name: ClassVar[str]  # of its row in the table
    random: ClassVar[bool]  # whether the seed matters

    def paths(
        self, dataset: Dataset, samples: np.ndarray, validation: Validation, seed: int
    ) -> Iterator[Iterator[tuple[Parameters, Baseline]]]:
        """Candidates fitted on `samples`, in paths: along one the same model grows, say by epochs.

        A candidate is good until the next one is asked for.
        """

    def fit(self, dataset: Dataset, samples: np.ndarray, parameters: Parameters, seed: int) -> Baseline:
        """The candidate with these parameters, fitted on `samples`."""

    def restore(self, dataset: Dataset, arrays: Mapping[str, np.ndarray], parameters: Parameters) -> Baseline:
        """From `Baseline.arrays`."""


@dataclass(frozen=True)
class Validation:
    """What candidates are compared on."""

    dataset: Dataset
    samples: np.ndarray
    exclude_history: bool  # whether the user's earlier items leave the ranking

    @classmethod
    def of(cls, dataset: Dataset, *, exclude_history: bool) -> Validation:
        samples = dataset.split("valid")
        return cls(dataset, samples[evenly_spread(len(samples), ROWS)], exclude_history)

    def exclude(self, samples: np.ndarray) -> list[np.ndarray] | None:
        """Items that leave each sample's ranking."""
        return self.dataset.seen_of(samples) if self.exclude_history else None

    def ndcg(self, baseline: Baseline) -> float:
        """NDCG@10; 0 without samples."""
        total = 0.0
        for start in range(0, len(self.samples), CHUNK):
            chunk = self.samples[start : start + CHUNK]
            scores = baseline.scores(self.dataset, chunk)
            total += float(ndcg(ranks(scores, self.dataset.targets(chunk), self.exclude(chunk)), 10).sum())
        return total / max(len(self.samples), 1)


@dataclass(frozen=True)
class Tuned:
    parameters: Parameters
    ndcg: float  # NDCG@10 on validation
    tried: int  # candidates


def tune(
    family: Family,
    dataset: Dataset,
    samples: np.ndarray,
    validation: Validation,
    progress: Callable[[Parameters, float], None] = lambda parameters, value: None,
) -> Tuned:
    """The candidate with the best NDCG@10 on validation when fitted on `samples`; the first of equals."""
    return best_of(climb(path, validation, progress) for path in family.paths(dataset, samples, validation, 0))


def climb(
    path: Iterator[tuple[Parameters, Baseline]],
    validation: Validation,
    progress: Callable[[Parameters, float], None] = lambda parameters, value: None,
) -> Tuned:
    """The best candidate of one path, which is left after `PATIENCE` candidates without a better one."""
    best, tried, waited = Tuned({}, -1.0, 0), 0, 0
    for parameters, baseline in path:
        value = validation.ndcg(baseline)
        progress(parameters, value)
        tried += 1
        best, waited = (Tuned(parameters, value, tried), 0) if value > best.ndcg else (best, waited + 1)
        if waited >= PATIENCE:
            break
    return replace(best, tried=tried)


def best_of(paths: Iterable[Tuned]) -> Tuned:
    """The best of the paths, the first of equals, with all that was tried."""
    found = list(paths)
    best = max(found, key=lambda one: one.ndcg, default=Tuned({}, -1.0, 0))
    return replace(best, tried=sum(one.tried for one in found))
