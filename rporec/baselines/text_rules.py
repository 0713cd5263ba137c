"""The cheap blend: transition rules, text neighbours, popularity and what is in the history, weighed by search.

The reference that a method has to beat before its reasoning means anything. It has the experts of the
RecHead, their search, and two components more; it has no network.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import scipy.sparse as sp

from rporec.baselines.family import CHUNK, Baseline, Parameters, Validation
from rporec.baselines.item_to_item import shrunken
from rporec.evaluation.cold import rows_of
from rporec.models.experts import Experts, newest, search_weights
from rporec.models.head_inputs import HeadInputs

if TYPE_CHECKING:
    from rporec.data import Dataset

SHRINKAGE = 50.0  # of the linear rules
LONG = 10  # newest items that the linear rules start from


@dataclass(frozen=True)
class TextRules:
    """Weighted sum of the experts and of two linear components: `rules_linear` and `text_newest`.

    `rules_linear` keeps how sure a rule is, where the expert `rules` is relative to the best rule of its
    sample. `text_newest` are the text neighbours of the newest item alone.
    """

    experts: Experts
    weights: dict[str, float]

    def scores(self, dataset: Dataset, samples: np.ndarray) -> np.ndarray:
        inputs = _inputs(dataset, samples)
        result = self.experts.weigh(inputs, self.weights).scores()
        for name, part in self._linear(inputs).items():
            if weight := self.weights.get(name):
                result += np.float32(weight) * part.toarray()
        return result

    def components(self, dataset: Dataset, samples: np.ndarray) -> dict[str, np.ndarray]:
        """name -> float32 [B, N], before any weight."""
        inputs = _inputs(dataset, samples)
        linear = {name: part.toarray() for name, part in self._linear(inputs).items()}
        return self.experts.features(inputs) | linear

    def _linear(self, inputs: HeadInputs) -> dict[str, sp.csr_matrix]:
        size = self._rules.shape[0]
        return {
            "rules_linear": newest(inputs.seen, size, LONG) @ self._rules,
            "text_newest": newest(inputs.seen, size, 1) @ self.experts.neighbours,
        }

    @cached_property
    def _rules(self) -> sp.csr_matrix:
        return shrunken(self.experts.rules, SHRINKAGE)

    def arrays(self) -> dict[str, np.ndarray]:
        half_lives = {f"half_life.{name}": np.array(value) for name, value in self.experts.half_lives.items()}
        return self.experts.arrays() | half_lives


class Blend:
    """Its one candidate: the scalars that `search_weights` finds on validation."""

    name: ClassVar[str] = "text_rules"
    random: ClassVar[bool] = False

    def paths(
        self, dataset: Dataset, samples: np.ndarray, validation: Validation, seed: int
    ) -> Iterator[Iterator[tuple[Parameters, Baseline]]]:
        fitted = TextRules(Experts.fit(dataset, rows_of(dataset, samples)), {})
        asked = validation.samples
        weights: dict[str, float] = {}
        if len(asked):
            chunks = [fitted.components(dataset, asked[at : at + CHUNK]) for at in range(0, len(asked), CHUNK)]
            parts = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}
            weights, _ = search_weights(parts, dataset.targets(asked), validation.exclude(asked))
        yield iter([({"weights": weights}, TextRules(fitted.experts, weights))])

    def fit(self, dataset: Dataset, samples: np.ndarray, parameters: Parameters, seed: int) -> TextRules:
        return TextRules(Experts.fit(dataset, rows_of(dataset, samples)), parameters["weights"])

    def restore(self, dataset: Dataset, arrays: Mapping[str, np.ndarray], parameters: Parameters) -> TextRules:
        prefix = "half_life."
        half_lives = {name.removeprefix(prefix): float(v) for name, v in arrays.items() if name.startswith(prefix)}
        return TextRules(Experts.from_arrays(arrays, half_lives), parameters["weights"])


def _inputs(dataset: Dataset, samples: np.ndarray) -> HeadInputs:
    return HeadInputs.without_text([dataset.seen(int(sample)) for sample in samples], dataset.times(samples))
