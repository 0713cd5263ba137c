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
