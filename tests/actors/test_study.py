"""`rporec study` on the small training: what is there is kept, what is missing is made, once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from trained_run import Watched, rporec

from rporec.files import read_json

pytestmark = [pytest.mark.engine, pytest.mark.cluster]


def test_a_study_goes_on_with_its_run_ends_in_a_result_and_is_not_done_twice(trained: Watched, tmp_path: Path) -> None:
    run, out = tmp_path / "runs" / "small-seed0", tmp_path / "out"
    shutil.copytree(trained.folder, run, ignore=shutil.ignore_patterns("ray", "checkpoints", "metrics.json"))
    config = str(trained.folder.parent / "small.yaml")
    words = ("study", config, "evaluate.baselines=rules", "--runs", str(run.parent), "--out", str(out), "--seed", "0")
    kept = {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}

    done = rporec(*words)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = read_json(out / "small-seed0.json")
    table = result["conventions"][result["headline"]]
    assert {"rules", "rporec_stage2", "rporec_stage2_refreshed"} <= table["methods"].keys()
    assert "rporec_stage2_refreshed-rporec_stage1_refreshed" in table["paired"]
    assert "popularity" not in table["methods"]  # of the training's own evaluation
    assert result["stages"].keys() == {"data", "warmup", "stage1", "stage2", "evaluate"}
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    written = (out / "small-seed0.json").stat().st_mtime_ns

    shutil.rmtree(run)
    again = rporec(*words)
    assert (again.returncode, (out / "small-seed0.json").stat().st_mtime_ns) == (0, written)
    assert "rporec_stage2" in again.stdout
    assert not run.exists()
    refused = rporec(*words, "rl.lr=1e-5")
    assert refused.returncode == 2
    assert "made with another rl.lr" in refused.stderr
    tables = rporec("study", "--tables", str(out))
    assert "| rporec_stage2_refreshed − rporec_stage1_refreshed |" in tables.stdout
