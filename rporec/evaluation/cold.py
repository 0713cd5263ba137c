"""What training has seen: the interactions that samples of a split hold, and the items they never show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from rporec.data import Dataset

Split = Literal["train", "valid", "test"]


def rows_of(dataset: Dataset, samples: np.ndarray) -> np.ndarray:
    """Interaction rows that these samples hold as target or history, int64, ascending.

    For each user everything up to the last of the samples: what a head trained on them has seen.
    """
    last = np.full(len(dataset.user_ids), -1, dtype=np.int64)
    np.maximum.at(last, dataset.sample_user[samples], dataset.sample_row[samples])
    owner = np.repeat(np.arange(len(dataset.user_ids)), np.diff(dataset.offsets))
    return np.flatnonzero(np.arange(len(dataset.items)) <= last[owner])


def held_rows(dataset: Dataset, splits: Sequence[Split] = ("train",)) -> np.ndarray:
    """Interaction rows that samples of these splits hold, as target or as history; int64, ascending.

    For each user: everything up to the last sample of the splits. What a baseline may be fitted on.
    """
    return rows_of(dataset, np.concatenate([dataset.split(split) for split in splits]))


def cold_items(dataset: Dataset, splits: Sequence[Split] = ("train",)) -> frozenset[str]:
    """Ids of the items that no sample of these splits holds."""
    warm = np.zeros(len(dataset.catalog), dtype=bool)
    warm[dataset.items[held_rows(dataset, splits)]] = True
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
