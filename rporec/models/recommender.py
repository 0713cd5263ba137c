"""Recommendations from a RecHead: scores, masks, the best k."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rporec.data import Catalog
from rporec.models.head_inputs import HeadInputs
from rporec.models.rechead import RecHead


class Recommender:
    """`head` is frozen. `exact_below`: items up to which every item is scored."""

    def __init__(self, head: RecHead, *, exact_below: int = 200_000) -> None:
        self.head, self.exact_below = head, exact_below

    @property
    def catalog(self) -> Catalog:
        return self.head.catalog

    def recommend(
        self,
        inputs: HeadInputs,
        k: Sequence[int],
        exclude: Sequence[np.ndarray],
        allowed: Sequence[np.ndarray | None],
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Per row (items int64, scores float32), best first, of equals the lower index; fewer than k where fewer remain.

        exclude: item indices. allowed: bool [N], None for all.
        """
        table = self.head.scores(inputs).numpy()
        answers = []
        for scores, most, out, may in zip(table, k, exclude, allowed, strict=True):
            scores[out] = -np.inf
            if may is not None:
                scores[~may] = -np.inf
            best = np.argsort(-scores, kind="stable")[:most]
            best = best[np.isfinite(scores[best])]
            answers.append((best, scores[best]))
        return answers

    def grown(self, catalog: Catalog) -> Recommender:
        """The same model over a catalogue that has all its items at the same indices and new ones behind them."""
        return Recommender(self.head.with_catalog(catalog).freeze(), exact_below=self.exact_below)
