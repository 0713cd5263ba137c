"""What training may see: its samples cut by time into warm-up | head | RL, and the interactions that samples hold.

A head trained on rationales that the target shaped learns to trust leaked answers, and RL on prompts
that it has seen finds nothing left to gain. So the three see different samples, oldest first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from rporec.config import Config, ConfigError

if TYPE_CHECKING:
    from rporec.data import Dataset

Split = Literal["train", "valid", "test"]


@dataclass(frozen=True)
class TrainSlices:
    """Sample numbers in time order; `head` and `warmup` may have been cut to their newest."""

    warmup: np.ndarray
    head: np.ndarray
    rl: np.ndarray
    before_rl: np.ndarray  # all samples before the RL slice, whatever was cut


def train_slices(train: np.ndarray, config: Config) -> TrainSlices:
    """Cut the training samples (time order) by the config's shares.

    Without warm-up its share goes to the head. Raises ConfigError when a slice that is needed is empty.
    """
    shares = config.slices
    warms_up = config.warmup.steps != 0
    warmup_share = shares.warmup if warms_up else 0.0
    total = shares.warmup + shares.head + shares.rl
    first = int(len(train) * warmup_share / total)
    last = int(len(train) * (shares.warmup + shares.head) / total)
    warmup, head, rl = _newest(train[:first], config.max_warmup_samples), train[first:last], train[last:]
    supervised = last if config.writes_items else len(warmup)  # items are learned from all before the RL slice
    if not len(head) or (config.steps and not len(rl)) or (warms_up and not supervised):
        raise ConfigError(
            f"slices: {len(train)} training samples leave {len(warmup)} for warm-up, {len(head)} for the head, "
            f"{len(rl)} for RL; each needs some: bring more interactions, change slices.* or max_warmup_samples, or do "
            "without (warmup.steps: 0, steps: 0)"
        )
    return TrainSlices(warmup, _newest(head, config.max_head_samples), rl, train[:last])


def tuning_samples(dataset: Dataset, *, refit: bool) -> np.ndarray:
    """The training samples that candidates are fitted on while validation chooses among them.

    They end as far before validation as the final fit ends before test. With `refit` that fit includes
    validation, so they are all of train. Without, test lies one split behind it, and they lack the newest
    eighth: fitted right up to validation, what forgets fast would win there and lose on test. Where splits
    do not follow time there is no such distance.
    """
    train = dataset.split("train")
    follows_time = dataset.manifest.get("settings", {}).get("split") != "leave-one-out"
    return train[: len(train) - len(train) // 8] if follows_time and not refit else train


def rows_of(dataset: Dataset, samples: np.ndarray) -> np.ndarray:
    """Interaction rows that these samples hold as target or history, int64, ascending.

    For each user everything up to the last of the samples: what a head trained on them has seen.
    """
    last = np.full(len(dataset.user_ids), -1, dtype=np.int64)
    np.maximum.at(last, dataset.sample_user[samples], dataset.sample_row[samples])
    return np.flatnonzero(np.arange(len(dataset.items)) <= last[dataset.owner])


def held_rows(dataset: Dataset, splits: Sequence[Split] = ("train",)) -> np.ndarray:
    """Interaction rows that samples of these splits hold, as target or as history; int64, ascending.

    For each user: everything up to the last sample of the splits. What a baseline may be fitted on.
    """
    return rows_of(dataset, np.concatenate([dataset.split(split) for split in splits]))


def evenly_spread(size: int, most: int) -> np.ndarray:
    """At most `most` of the positions 0 … size - 1, evenly spread over them; int64, ascending."""
    return np.unique(np.linspace(0, size - 1, min(size, most)).astype(np.int64)) if size else np.zeros(0, np.int64)


def _newest(samples: np.ndarray, limit: int | None) -> np.ndarray:
    return samples if limit is None else samples[max(0, len(samples) - limit) :]
