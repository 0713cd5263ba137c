"""The cheap blend: the RecHead's experts, weighed by its search, without its networks; and the same with the reranker.

The first is the reference that a method has to beat before its reasoning means anything, the second tells what of
a head's lead is its reranker's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from rporec.baselines.family import CHUNK, Baseline, Parameters, Validation
from rporec.config import ConfigError
from rporec.data.slices import rows_of
from rporec.models.experts import Experts
from rporec.models.head_inputs import HeadInputs
from rporec.models.weight_search import search_weights

if TYPE_CHECKING:
    from rporec.data import Dataset

HALF_LIFE = "half_life."  # prefix of their names among the arrays


@dataclass(frozen=True)
class TextRules:
    """Weighted sum of the experts."""

    experts: Experts
    weights: dict[str, float]

    def scores(self, dataset: Dataset, samples: np.ndarray) -> np.ndarray:
        return self.experts.weigh(HeadInputs.of(dataset, samples), self.weights).scores()

    def arrays(self) -> dict[str, np.ndarray]:
        half_lives = {HALF_LIFE + name: np.array(value) for name, value in self.experts.half_lives.items()}
        return self.experts.arrays() | half_lives


class Blend:
    """Its one candidate: the scalars that `search_weights` finds on validation."""

    name: ClassVar[str] = "text_rules"
    random: ClassVar[bool] = False

    def paths(
        self, dataset: Dataset, samples: np.ndarray, validation: Validation, seed: int
    ) -> Iterator[Iterator[tuple[Parameters, Baseline]]]:
        yield self._searched(dataset, samples, validation, seed)

    def _searched(
        self, dataset: Dataset, samples: np.ndarray, validation: Validation, seed: int
    ) -> Iterator[tuple[Parameters, Baseline]]:
        experts, asked = self._experts(dataset, samples, seed), validation.samples
        weights: dict[str, float] = {}
        if len(asked):
            chunked = (HeadInputs.of(dataset, asked[at : at + CHUNK]) for at in range(0, len(asked), CHUNK))
            chunks = [experts.features(inputs, experts.joined) for inputs in chunked]
            parts = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in experts.joined}
            weights, _ = search_weights(parts, dataset.targets(asked), validation.exclude(asked))
            weights = experts.whole(weights)
        yield {"weights": weights}, TextRules(experts, weights)

    def fit(self, dataset: Dataset, samples: np.ndarray, parameters: Parameters, seed: int) -> TextRules:
        return TextRules(self._experts(dataset, samples, seed), parameters["weights"])

    def _experts(self, dataset: Dataset, samples: np.ndarray, seed: int) -> Experts:
        return Experts.fit(dataset, rows_of(dataset, samples))

    def restore(self, dataset: Dataset, arrays: Mapping[str, np.ndarray], parameters: Parameters) -> TextRules:
        half_lives = {
            name.removeprefix(HALF_LIFE): float(value) for name, value in arrays.items() if name.startswith(HALF_LIFE)
        }
        return TextRules(Experts.from_arrays(arrays, half_lives), parameters["weights"])


class RerankedBlend(Blend):
    """The reranker in their place, which reads what they say; the blend itself where there is too little to learn from."""

    name: ClassVar[str] = "text_rules_reranked"
    random: ClassVar[bool] = True

    def _experts(self, dataset: Dataset, samples: np.ndarray, seed: int) -> Experts:
        experts = super()._experts(dataset, samples, seed)
        try:
            return experts.stacked(dataset, samples, seed=seed)
        except ConfigError:
            return experts
