"""`max_staleness: 0` is plain sequential training: the real system against `sequential.Trainer`.

Between the two, float32 rounding differs (packed rows, micro-batches, ranks, padded batches in the
engine). It moves losses by some 1e-7, but it can be amplified where the method decides: a sampled
token next to a boundary of the cumulative distribution, a token's entropy next to the threshold.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from sequential import Step, Trainer
from trained_run import SMALL

from rporec.config import Config
from rporec.files import read_lines
from rporec.rl.rollout_schema import read_groups
from rporec.run import Run

pytestmark = [pytest.mark.engine, pytest.mark.cluster]

# The gradient norm is on both sides of the clip; 6 groups are 3 micro-batches, or 2 on each of 2 ranks.
CONFIG = f"""
{SMALL}
name: sequential
engine: {{kind: transformers, dtype: float32}}
head: {{epochs: 2, lr: 2e-3, dim: 32}}
max_staleness: 0
groups_per_step: 6
steps: 20
max_head_samples: 200
max_eval_samples: 60
eval_samples: 0
save_rollouts: true
rl: {{micro_batch_groups: 2, grad_clip: 0.5, validate_every: 10, validate_samples: 32}}
"""


@pytest.fixture(scope="module")
def before_stage2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sequential")
    (folder / "config.yaml").write_text(CONFIG)
    _train(folder / "config.yaml", folder / "run", "--stages", "data,warmup,stage1")
    return folder / "run"


def test_on_policy_training_is_sequential_training(before_stage2: Path, tmp_path: Path) -> None:
    """Same samples, same tokens from the same seeds, same rewards, same losses, for 20 steps."""
    run = _stage2(before_stage2, tmp_path / "run")
    _assert_same(run, Trainer(run, run.config()).steps(), tolerance=1e-5)


def test_the_learner_trains_on_what_vllm_wrote_as_the_reference_does(before_stage2: Path, tmp_path: Path) -> None:
    run = _stage2(before_stage2, tmp_path / "run", steps=8, engine={"kind": "vllm", "kv_cache_mb": 64})
    _assert_same(run, _replay(run), tolerance=1e-4)


def test_two_learner_ranks_are_one(before_stage2: Path, tmp_path: Path) -> None:
    run = _stage2(before_stage2, tmp_path / "run", steps=8, learners=2)
    _assert_same(run, _replay(run), tolerance=1e-4)


def _stage2(before: Path, folder: Path, **changes: Any) -> Run:
    """Stage 2 by the command line on a copy of the run, with another config where a resumed run allows none."""
    shutil.copytree(before, folder, ignore=shutil.ignore_patterns("ray"))
    raw = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        raw[key] = raw[key] | value if isinstance(value, dict) else value
    (folder / "config.json").write_text(json.dumps(raw))
    _train(folder / "config.json", folder, "--resume", "--stages", "stage2")
    return Run.open(folder)


def _train(config: Path, run: Path, *words: str) -> None:
    command = [sys.executable, "-m", "rporec.cli", "train", str(config), "--run", str(run), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def _consumed(run: Run, config: Config) -> list[list[pa.RecordBatch]]:
    return [read_groups(run.rollouts(step)) for step in range(config.steps)]


def _replay(run: Run) -> Iterable[Step]:
    config = run.config()
    groups = [group for step in _consumed(run, config) for group in step]
    return Trainer(run, config, [group.column("completion_ids").to_pylist() for group in groups]).steps()


def _assert_same(run: Run, expected: Iterable[Step], tolerance: float) -> None:
    config = run.config()
    records = read_lines(run.steps)
    size = config.groups_per_step
    for number, (step, record, groups) in enumerate(zip(expected, records, _consumed(run, config), strict=True)):
        drawn = [group.column("group")[0].as_py() for group in groups]
        assert drawn == list(range(number * size, (number + 1) * size)), f"step {number}: not in the order of drawing"
        for ours, theirs in zip(step.groups, groups, strict=True):
            assert theirs.column("sample")[0].as_py() == ours.sample
            assert theirs.column("prompt_ids")[0].as_py() == ours.prompt
            assert theirs.column("completion_ids").to_pylist() == ours.completions, f"step {number}"
            np.testing.assert_allclose(theirs.column("reward_without_entropy"), ours.judged, atol=1e-5)
        rank_0 = [reward for group in step.groups[:: config.learners] for reward in group.rewards]
        assert record["reward_mean"] == pytest.approx(np.mean(rank_0), abs=1e-5), f"step {number}"
        assert record["loss"] == pytest.approx(step.loss, abs=tolerance), f"step {number}"
        assert record["kl"] == pytest.approx(step.kl, abs=tolerance), f"step {number}"
    assert {record["staleness_max"] for record in records} == {0}
    assert np.mean([record["advantage_share"] for record in records]) > 0.5, "hardly a gradient to compare"
    assert records[-1]["kl"] > 1e-3, "the policy hardly moved"
