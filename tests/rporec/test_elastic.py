"""The rule by which rollout workers come and go."""

from __future__ import annotations

import pytest

from rporec.rl.elastic import Autoscaler


def after(waiting: float, idle: float, workers: int, low: int = 1, high: int = 4) -> int:
    scaler = Autoscaler(low, high, steps=3)
    for _ in range(3):
        scaler.observe(waiting, idle)
    return scaler.wanted(workers)


@pytest.mark.parametrize(
    ("waiting", "idle", "workers", "wanted"),
    [
        (0.6, 0.0, 2, 3),  # the learner starves and every slot is taken
        (0.0, 0.8, 2, 1),  # the buffer is full, workers wait for leases
        (0.1, 0.1, 2, 2),  # in balance
        (0.6, 0.8, 2, 2),  # both wait: more workers would not help
        (0.6, 0.0, 4, 4),  # at the upper bound
        (0.0, 0.8, 1, 1),  # at the lower
    ],
)
def test_workers_follow_what_waits(waiting: float, idle: float, workers: int, wanted: int) -> None:
    assert after(waiting, idle, workers) == wanted


def test_it_looks_at_new_steps_after_each_decision() -> None:
    scaler = Autoscaler(1, 8, steps=2)
    for _ in range(2):
        scaler.observe(0.9, 0.0)
    assert scaler.wanted(1) == 2
    scaler.observe(0.9, 0.0)
    assert scaler.wanted(2) == 2  # one step is no evidence
    scaler.observe(0.9, 0.0)
    assert scaler.wanted(2) == 3


def test_bounds_hold_from_the_beginning() -> None:
    assert Autoscaler(2, 4).wanted(1) == 2
    assert Autoscaler(2, 4).wanted(9) == 4
