import math

import pytest
import torch

from rporec.rl.advantages import group_advantages

GROUP = torch.tensor([0, 0, 0, 7, 7])
REWARDS = torch.tensor([1.0, 2.0, 6.0, 0.5, 0.5])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # Mean 3, squares 4 + 1 + 9 = 14 over n - 1 = 2.
        ("grpo", [-2 / math.sqrt(7), -1 / math.sqrt(7), 3 / math.sqrt(7), 0, 0]),
        ("dr_grpo", [-2.0, -1.0, 3.0, 0, 0]),
        ("rloo", [1 - 4, 2 - 3.5, 6 - 1.5, 0, 0]),
    ],
)
def test_advantages_of_a_hand_computed_group(kind, expected):
    torch.testing.assert_close(group_advantages(REWARDS, GROUP, kind), torch.tensor(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
def test_a_completion_whose_scoring_failed_changes_nothing_for_its_siblings(kind):
    rewards = torch.tensor([1.0, math.nan, 2.0, 6.0])
    found = group_advantages(rewards, torch.zeros(4, dtype=torch.long), kind, rewards.isfinite())
    alone = group_advantages(torch.tensor([1.0, 2.0, 6.0]), torch.zeros(3, dtype=torch.long), kind)
    assert found[1] == 0
    torch.testing.assert_close(found[[0, 2, 3]], alone)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
def test_a_flat_group_gives_exactly_zero_whatever_rounding_does(kind):
    rewards = torch.full((7,), 0.1)
    assert group_advantages(rewards, torch.zeros(7, dtype=torch.long), kind).tolist() == [0.0] * 7


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
def test_one_valid_completion_has_nothing_to_be_compared_with(kind):
    rewards = torch.tensor([0.9, math.nan])
    assert group_advantages(rewards, torch.zeros(2, dtype=torch.long), kind, rewards.isfinite()).tolist() == [0.0, 0.0]


def test_groups_may_be_interleaved():
    group = torch.tensor([0, 1, 0, 1])
    found = group_advantages(torch.tensor([1.0, 10.0, 3.0, 30.0]), group, "dr_grpo")
    assert found.tolist() == [-1.0, -10.0, 1.0, 10.0]


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="none of grpo"):
        group_advantages(REWARDS, GROUP, "ppo")
