"""How train is cut for its stages."""

from __future__ import annotations

import numpy as np
import pytest

from rporec.config import ConfigError, parse_config
from rporec.data.slices import evenly_spread, train_slices

TRAIN = np.arange(100)


def test_slices_follow_one_another_and_keep_their_newest():
    shares = {"warmup": 0.3, "head": 0.5, "rl": 0.2}
    slices = train_slices(TRAIN, parse_config({"slices": shares, "max_warmup_samples": 10, "max_head_samples": 20}))
    assert slices.warmup.tolist() == list(range(20, 30))
    assert slices.head.tolist() == list(range(60, 80))
    assert slices.rl.tolist() == list(range(80, 100))
    assert slices.before_rl.tolist() == list(range(80))


def test_without_warm_up_its_share_goes_to_the_head():
    slices = train_slices(TRAIN, parse_config({"warmup": {"steps": 0}}))
    assert (len(slices.warmup), len(slices.head), len(slices.rl)) == (0, 80, 20)


def test_items_are_learned_from_all_before_the_rl_slice():
    shares = {"warmup": 0.0, "head": 0.7, "rl": 0.3}
    slices = train_slices(TRAIN, parse_config({"recipe": "preference", "slices": shares}))
    assert (len(slices.warmup), len(slices.head)) == (0, 70)


@pytest.mark.parametrize(
    ("samples", "changes"),
    [
        (100, {"slices": {"warmup": 0.0}}),
        (100, {"max_warmup_samples": 0}),
        (100, {"slices": {"rl": 0.0}}),
        (2, {}),
    ],
)
def test_a_stage_without_samples_is_refused_before_anything_is_trained(samples, changes):
    with pytest.raises(ConfigError, match="each needs some"):
        train_slices(TRAIN[:samples], parse_config(changes))


@pytest.mark.parametrize(("size", "most", "expected"), [(0, 3, []), (1, 3, [0]), (3, 9, [0, 1, 2]), (9, 3, [0, 4, 8])])
def test_positions_are_spread_from_the_first_to_the_last(size, most, expected):
    assert evenly_spread(size, most).tolist() == expected
