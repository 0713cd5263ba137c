"""Which cores the learner computes on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from rich.console import Console

from actors.cluster import Cluster
from actors.job import Job
from rporec.config import parse_config
from rporec.run import Run


@pytest.mark.parametrize(
    ("allowed", "rollouts", "learners", "expected"),
    [
        ({0, 1}, 1, 1, [1]),
        ({2, 5, 6, 7}, 1, 1, [5, 6, 7]),  # two threads of its own and one core to spare
        ({0, 1}, 2, 1, None),  # nothing left: it shares
        ({0, 1}, 1, 2, None),  # one core for two ranks
        ({0, 1, 2, 3}, {"min": 1, "max": 3}, 1, None),  # two threads, and later but one core
    ],
)
def test_the_learner_keeps_off_the_cores_of_rollout_workers(
    monkeypatch: pytest.MonkeyPatch, allowed: set[int], rollouts: int, learners: int, expected: list[int] | None
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: allowed)
    config = parse_config({"rollout_workers": rollouts, "learners": learners})
    job = Job(Run(Path()), config, Cluster("", "", local=True, cuda=False), Console())
    assert job.learner_cores() == expected


def test_elsewhere_the_system_places_the_learner() -> None:
    for local, cuda in ((False, False), (True, True)):
        job = Job(Run(Path()), parse_config({}), Cluster("", "", local=local, cuda=cuda), Console())
        assert job.learner_cores() is None
