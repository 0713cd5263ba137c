"""Which cores the learner computes on."""

from __future__ import annotations

import io
import os
import time
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from rich.console import Console

from actors.cluster import Cluster
from actors.job import Job
from rporec.config import parse_config
from rporec.files import write_json
from rporec.run import Run, RunError


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


def test_a_resumed_run_does_not_end_of_what_it_once_failed_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from actors.reinforce import Watch

    actors = [{"role": "controller", "pid": 1}]
    write_json(tmp_path / "status.json", {"state": "FAILED", "failure": "then", "actors": actors, "time": time.time()})
    monkeypatch.setattr(Watch, "_still_there", lambda self: None)
    job = Job(Run(tmp_path), parse_config({}), Cluster("", "", local=True, cuda=False), Console(quiet=True))
    watch = Watch(job, MagicMock(), MagicMock())  # of the controller it asks nothing here
    watch()
    write_json(tmp_path / "status.json", {"state": "FAILED", "failure": "now", "actors": actors, "time": time.time()})
    with pytest.raises(RunError, match="stage 2 failed: now"):
        watch()


def test_a_resumed_run_tells_of_no_death_of_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from actors.reinforce import Watch

    death = {"role": "rollout", "name": "rollout-0", "pid": 1, "node": "n", "time": 1.0}
    death |= {"message": "of before", "cause": "", "log": "l"}
    status = {"state": "RUNNING", "deaths": [death], "notices": [{"time": 2.0, "message": "of before"}]}
    write_json(tmp_path / "status.json", {**status, "time": time.time()})
    monkeypatch.setattr(Watch, "_still_there", lambda self: None)
    console = Console(file=io.StringIO(), width=200)
    watch = Watch(Job(Run(tmp_path), parse_config({}), Cluster("", "", True, False), console), MagicMock(), MagicMock())
    watch()
    assert console.file.getvalue() == ""
    status["notices"] = [{"time": time.time() + 1, "message": "of now"}]
    write_json(tmp_path / "status.json", {**status, "time": time.time()})
    watch()
    assert console.file.getvalue() == "of now\n"
