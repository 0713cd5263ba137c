"""Which items training has shown often, rarely or never."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from rporec.data.slices import held_rows

if TYPE_CHECKING:
    from rporec.data import Dataset


def cold_items(dataset: Dataset) -> frozenset[str]:
    """Ids of the items that no training sample holds."""
    warm = np.zeros(len(dataset.catalog), dtype=bool)
    warm[dataset.items[held_rows(dataset)]] = True
    return frozenset(dataset.catalog.ids[item] for item in np.flatnonzero(~warm))


STRATA = ("head", "middle", "tail")  # by how often train has an item


def popularity_strata(dataset: Dataset, share: float = 0.2) -> dict[str, frozenset[str]]:
    """Ids of the items that train has shown, by popularity; what it never showed is cold and in none.

    `head`: the most popular items that together hold `share` of the interactions; `tail`: the least
    popular that do; `middle`: the rest. Abdollahpouri et al. 2019, arXiv 1907.13286, section 3.
    """
    counts = np.bincount(dataset.items[held_rows(dataset)], minlength=len(dataset.catalog))
    order = np.argsort(-counts, kind="stable")
    order = order[counts[order] > 0]
    before = (np.cumsum(counts[order]) - counts[order]) / max(counts.sum(), 1)
    stratum = np.where(before < share, 0, np.where(before < 1 - share, 1, 2))
    return {
        name: frozenset(dataset.catalog.ids[item] for item in order[stratum == number])
        for number, name in enumerate(STRATA)
    }
