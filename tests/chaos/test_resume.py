"""`max_staleness: 0`: a run that was killed and resumed has the losses of one that never was, bit for bit."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from live_run import STEPS, LiveRun, assert_whole

pytestmark = pytest.mark.chaos

# What follows from the seed. Times and paths do not.
SAME = (
    "version",
    "reward_mean",
    "reward_parts",
    "loss",
    "kl",
    "entropy",
    "grad_norm",
    "tokens",
    "engine_mismatch",
    "probe_mismatch",
)


def history(run: LiveRun) -> list[dict[str, Any]]:
    return [{key: record[key] for key in SAME} for record in run.steps]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, start_stage2) -> list[dict[str, Any]]:
    with start_stage2(tmp_path_factory.mktemp("unbroken")) as start:
        run = start(max_staleness=0)
        assert_whole(run, run.finish())
        assert len({record["loss"] for record in run.steps}) == STEPS
        assert max(abs(record["reward_mean"]) for record in run.steps) > 0
        return history(run)


@pytest.mark.parametrize("seed", range(3))
def test_a_killed_and_resumed_run_repeats_every_loss(stage2, unbroken: list[dict[str, Any]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    run = stage2(max_staleness=0)
    run.at_step(int(rng.integers(1, STEPS - 2)))
    time.sleep(float(rng.uniform(0.0, 1.0)))  # somewhere within the step
    run.kill_all()
    assert len(run.steps) < STEPS, "the run was over before it was killed"
    again = stage2(folder=run.folder)
    assert_whole(again, again.finish())
    assert history(again) == unbroken
