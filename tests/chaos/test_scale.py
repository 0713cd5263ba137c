"""`rporec scale` on a live run, up and down, without a restart and without losing a group."""

from __future__ import annotations

import subprocess

import pytest
from live_run import LiveRun, assert_whole, rporec

pytestmark = pytest.mark.chaos


def scale(run: LiveRun, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(rporec("scale", str(run.folder), *options), capture_output=True, text=True, timeout=120)


def alive(status: dict, role: str) -> int:
    return sum(one["role"] == role and one["state"] == "ALIVE" for one in status["actors"])


def test_a_live_run_grows_and_shrinks(stage2) -> None:
    run = stage2("rollout_workers=1", "reward_workers=1", "steps=200")
    run.at_step(2)
    done = scale(run, "--rollout-workers", "2", "--reward-workers", "2")
    assert done.returncode == 0, done.stderr
    assert "rollout-0: alive" in done.stdout
    grown = run.wait(lambda status: alive(status, "rollout") == 2 and alive(status, "reward") == 2)
    run.at_step(grown["step"] + 3)
    assert scale(run, "--rollout-workers", "1", "--reward-workers", "1").returncode == 0
    shrunk = run.wait(lambda status: sum(one["role"] in ("rollout", "reward") for one in status["actors"]) == 2)
    assert shrunk["step"] < 200, "the run was over before it shrank; give it more steps"
    status = run.finish()
    assert_whole(run, status, steps=200)
    assert status["deaths"] == []
    assert status["attempt"] == 0


def test_a_starving_learner_gets_more_workers_by_itself(stage2) -> None:
    run = stage2("rollout_workers={min: 1, max: 2}", "steps=40", engine__max_num_seqs=4)
    run.wait(lambda status: alive(status, "rollout") == 2, 300)
    assert_whole(run, run.finish(), steps=40)


def test_what_cannot_be_scaled_is_said_in_one_line(before_stage2) -> None:
    run = LiveRun(before_stage2 / "run", None, None)  # type: ignore[arg-type]
    for options, reason in (
        (("--rollout-workers", "2"), "no training is in stage 2"),
        (("--rollout-workers", "0"), "needs 1 or more"),
        ((), "--rollout-workers N"),
    ):
        done = scale(run, *options)
        assert done.returncode == 2
        assert reason in done.stderr
        assert done.stderr.count("\n") == 1
