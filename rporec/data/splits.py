"""Which samples train, which validate, which test; and the k-core."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rporec.data.errors import DataError
from rporec.data.samples import SPLITS

FIRST, TRAIN, VALID, TEST = range(4)


@dataclass(frozen=True)
class SplitRule:
    """`time[:a:b:c]`, `leave-one-out` or `column:NAME`."""

    kind: Literal["time", "leave-one-out", "column"]
    shares: tuple[int, int, int] = (8, 1, 1)
    column: str = ""

    @classmethod
    def parse(cls, text: str) -> SplitRule:
        """Raises DataError for anything else."""
        if text == "leave-one-out":
            return cls("leave-one-out")
        if text.startswith("column:") and len(text) > len("column:"):
            return cls("column", column=text.removeprefix("column:"))
        if text == "time":
            return cls("time")
        if match := re.fullmatch(r"time:(\d+):(\d+):(\d+)", text):
            shares = (int(match[1]), int(match[2]), int(match[3]))
            if min(shares) > 0:
                return cls("time", shares)
        raise DataError(f"split {text!r}: use time, time:8:1:1 (shares above 0), leave-one-out or column:NAME")

    def assign(self, sample_row: np.ndarray, last_row: np.ndarray, label: np.ndarray | None) -> np.ndarray:
        """int8 [n] split of each sample.

        `sample_row` [n] rows of the targets in sample (time) order, `last_row` [n] the last row of each sample's
        user, `label` int8 [rows] the split column by row. `time` cuts the n samples at floor(share of train * n)
        and floor(share of train and valid * n).
        """
        n = len(sample_row)
        split = np.full(n, TRAIN, np.int8)
        if self.kind == "column":
            assert label is not None
            return label[sample_row]
        if self.kind == "leave-one-out":
            split[sample_row == last_row - 1] = VALID
            split[sample_row == last_row] = TEST
            return split
        train, valid, _ = self.shares
        split[n * train // sum(self.shares) :] = VALID
        split[n * (train + valid) // sum(self.shares) :] = TEST
        return split


def split_codes(labels: list[str]) -> np.ndarray:
    """int8 code of each distinct label of a split column; -1 for one that is no split."""
    return np.array([SPLITS.index(label) if label in SPLITS else -1 for label in labels], np.int8)


def k_core(user: np.ndarray, item: np.ndarray, k: int) -> np.ndarray:
    """bool [rows]: the largest set of interactions in which every user and every item has at least `k` of them."""
    keep = np.ones(len(user), bool)
    while True:
        user_count = np.bincount(user[keep], minlength=user.max(initial=0) + 1)
        item_count = np.bincount(item[keep], minlength=item.max(initial=0) + 1)
        kept = keep & (user_count[user] >= k) & (item_count[item] >= k)
        if kept.sum() == keep.sum():
            return keep
        keep = kept
