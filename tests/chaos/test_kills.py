"""Each role is killed in a real run under load: vLLM, DeepSpeed, Ray. No group may be lost."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import psutil
import pytest
from live_run import LiveRun, assert_whole

from rporec.files import read_json

pytestmark = pytest.mark.chaos


def recovery(run: LiveRun, killed: float, role: str) -> float:
    """Seconds from the kill to the end of the first step that came of it: a new attempt's, or just the next."""
    before = len(run.steps)
    rolls_back = role in ("learner", "controller")
    attempt = run.status["attempt"]
    run.wait(lambda _: run.steps[-1]["attempt"] > attempt if rolls_back else len(run.steps) > before + 1, 240)
    seconds = time.time() - killed
    print(json.dumps({"role": role, "seconds_to_next_step": round(seconds, 1)}))
    return seconds


@pytest.mark.parametrize("role", ["rollout", "reward"])
def test_a_killed_worker_is_replaced(stage2, role: str) -> None:
    run = stage2()
    run.at_step(3)
    killed = run.kill(role)
    recovery(run, killed, role)
    status = run.finish()
    assert_whole(run, status)
    (death,) = status["deaths"]
    assert death["role"] == role
    assert f"{role} {death['name']}" in run.output()
    assert str(death["pid"]) in death["log"]
    names = {one["name"] for one in status["actors"] if one["role"] == role}
    assert len(names) == 2
    assert death["name"] not in names


def test_the_last_rollout_worker_is_replaced_too(stage2) -> None:
    run = stage2("rollout_workers=1")
    run.at_step(3)
    recovery(run, run.kill("rollout"), "only rollout")
    assert_whole(run, run.finish())


def test_a_killed_learner_goes_back_to_the_newest_checkpoint(stage2) -> None:
    run = stage2()
    run.at_step(6)  # the checkpoint of step 4 is there
    recovery(run, run.kill("learner"), "learner")
    status = run.finish()
    assert_whole(run, status)
    assert status["attempt"] == 1
    assert [record["attempt"] for record in run.steps] == sorted(record["attempt"] for record in run.steps)
    assert {record["attempt"] for record in run.steps if record["step"] < 4} == {0}
    assert any(death["role"] == "learner" for death in status["deaths"])


def test_a_killed_controller_is_restarted_from_the_newest_checkpoint(stage2) -> None:
    run = stage2()
    run.at_step(6)
    recovery(run, run.kill("controller"), "controller")
    status = run.finish()
    assert_whole(run, status)
    assert status["attempt"] >= 1
    assert any(death["role"] == "controller" for death in status["deaths"])


def test_the_weight_store_takes_the_controller_with_it_and_both_come_back(stage2) -> None:
    run = stage2()
    run.at_step(6)
    family = psutil.Process(run.process.pid).children(recursive=True)
    (store,) = (one for one in family if one.status() != "zombie" and one.cmdline()[0].startswith("ray::WeightStore"))
    store.kill()
    recovery(run, time.time(), "controller")
    status = run.finish()
    assert_whole(run, status)
    assert (
        {"weight store"} <= {death["role"] for death in status["deaths"]} <= {"weight store", "controller", "learner"}
    )


def test_a_reward_worker_that_hangs_is_timed_out(stage2) -> None:
    run = stage2(reward__timeout=5.0)
    run.at_step(3)
    recovery(run, run.kill("reward", signal.SIGSTOP), "reward, stopped")
    status = run.finish()
    assert_whole(run, status)
    (death,) = status["deaths"]
    assert "reward.timeout" in death["message"]


def test_a_rollout_worker_that_hangs_is_replaced(stage2) -> None:
    run = stage2(engine__timeout=10.0)
    run.at_step(3)
    recovery(run, run.kill("rollout", signal.SIGSTOP), "rollout, stopped")
    status = run.finish()
    assert_whole(run, status)
    (death,) = status["deaths"]
    assert "engine.timeout" in death["message"]


def test_a_kill_of_everything_is_resumed_without_losing_a_group(stage2) -> None:
    run = stage2()
    run.at_step(7)
    run.kill_all()
    again = stage2(folder=run.folder)
    assert_whole(again, again.finish())
    assert {record["attempt"] for record in again.steps if record["step"] < 4} == {0}
    assert again.steps[-1]["attempt"] == 1


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_stopped_run_leaves_a_checkpoint_and_no_process(stage2, how: signal.Signals) -> None:
    run = stage2("steps=200")
    run.at_step(5)
    family = psutil.Process(run.process.pid).children(recursive=True)
    run.process.send_signal(how)
    assert run.process.wait(120) == 130
    assert "--resume" in run.output()
    status = run.status
    assert status["state"] == "STOPPED"
    newest = max(int(path.name.removeprefix("step_")) for path in (run.folder / "checkpoints").glob("step_*"))
    assert newest == status["step"] == len(run.steps)
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive
    steps = newest + 10
    again = stage2(f"steps={steps}", folder=run.folder)
    assert_whole(again, again.finish(), steps)
    assert [record["attempt"] for record in again.steps] == [0] * newest + [1] * 10


def test_a_reward_that_always_raises_ends_the_run_with_its_reason(stage2, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "broken_reward.py").write_text("def reward(*_):\n    raise ValueError('this reward is out of order')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    run = stage2(reward__custom="broken_reward:reward")
    assert run.process.wait(240) != 0
    line = run.output().strip().splitlines()[-1]
    assert line.startswith("rporec: stage 2 failed")
    assert "this reward is out of order" in line
    assert read_json(run.folder / "status.json")["state"] == "FAILED"


def test_an_endless_learner_failure_ends_the_run(stage2) -> None:
    run = stage2("checkpoint_every=1000", "steps=1000")
    for times in range(4):
        run.wait(lambda status, times=times: status["attempt"] == times and status["step"] >= 1, 240)
        run.kill("learner")
    assert run.process.wait(240) != 0
    assert "the learner died" in run.output()
