"""The rule by which rollout and reward workers come and go."""

from __future__ import annotations

import pytest

from rporec.rl.elastic import Autoscaler

BOTH = {"rollout": (1, 4), "reward": (1, 4)}


def after(
    waiting: float, loads: dict[str, float], workers: dict[str, int], **bounds: tuple[int, int]
) -> dict[str, int]:
    scaler = Autoscaler(bounds or BOTH, steps=3)
    for _ in range(3):
        scaler.observe(waiting, loads)
    return scaler.wanted(workers)


@pytest.mark.parametrize(
    ("waiting", "load", "workers", "wanted"),
    [
        (0.6, 1.0, 2, 3),  # the learner starves and every slot is taken
        (0.0, 0.2, 2, 1),  # the buffer is full, workers wait for leases
        (0.1, 0.9, 2, 2),  # in balance
        (0.1, 7.0, 2, 2),  # a queue that the learner does not wait for
        (0.6, 0.2, 2, 2),  # both wait: more workers would not help
        (0.6, 1.0, 4, 4),  # at the upper bound
        (0.0, 0.2, 1, 1),  # at the lower
    ],
)
@pytest.mark.parametrize("role", ["rollout", "reward"])
def test_workers_follow_what_waits(role: str, waiting: float, load: float, workers: int, wanted: int) -> None:
    assert after(waiting, {role: load}, {role: workers}, **{role: (1, 4)}) == {role: wanted}


@pytest.mark.parametrize(
    ("rollout", "reward", "wanted"),
    [
        (5.0, 0.1, {"rollout": 3, "reward": 2}),  # prompts queue
        (0.7, 3.0, {"rollout": 2, "reward": 3}),  # what was written queues
        (5.0, 1.1, {"rollout": 3, "reward": 2}),  # reward workers always have a batch, but a small one
        (0.4, 0.3, {"rollout": 2, "reward": 2}),  # neither: the learner waits for something else
    ],
)
def test_only_the_role_that_limits_grows(rollout: float, reward: float, wanted: dict[str, int]) -> None:
    assert after(0.6, {"rollout": rollout, "reward": reward}, {"rollout": 2, "reward": 2}) == wanted


def test_both_shrink_when_both_idle() -> None:
    assert after(0.0, {"rollout": 0.3, "reward": 0.1}, {"rollout": 3, "reward": 2}) == {"rollout": 2, "reward": 1}


def test_no_role_grows_behind_one_that_is_fixed_and_limits() -> None:
    loads, workers = {"rollout": 0.8, "reward": 4.0}, {"rollout": 2, "reward": 1}
    assert after(0.6, loads, workers, rollout=(1, 4)) == {"rollout": 2}


def test_it_looks_at_new_steps_after_each_decision() -> None:
    scaler = Autoscaler({"rollout": (1, 8)}, steps=2)
    for _ in range(2):
        scaler.observe(0.9, {"rollout": 1.0})
    assert scaler.wanted({"rollout": 1}) == {"rollout": 2}
    scaler.observe(0.9, {"rollout": 1.0})
    assert scaler.wanted({"rollout": 2}) == {"rollout": 2}  # one step is no evidence
    scaler.observe(0.9, {"rollout": 1.0})
    assert scaler.wanted({"rollout": 2}) == {"rollout": 3}


def test_what_was_set_by_hand_beyond_the_bounds_stays_until_the_rule_moves_it_back() -> None:
    assert Autoscaler({"rollout": (2, 4)}).wanted({"rollout": 9}) == {"rollout": 9}
    assert after(0.6, {"rollout": 5.0}, {"rollout": 9}, rollout=(2, 4)) == {"rollout": 9}
    assert after(0.0, {"rollout": 0.1}, {"rollout": 9}, rollout=(2, 4)) == {"rollout": 8}
    assert after(0.0, {"rollout": 0.1}, {"rollout": 1}, rollout=(2, 4)) == {"rollout": 1}
    assert after(0.6, {"rollout": 5.0}, {"rollout": 1}, rollout=(2, 4)) == {"rollout": 2}
