"""`rporec debug`: saved groups that cannot be replayed are refused before anything starts."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors.debug import saved_groups
from rporec import cli
from rporec.config import parse_config
from rporec.engine.types import FIRST_VERSION, Generated
from rporec.rl.rewards import Scored
from rporec.rl.rollout_schema import Lease, rollout_batch, with_rewards, write_groups
from rporec.run import Run

PIECES = ["a", "b"]


def group(number: int, *, scored: bool = True) -> pa.RecordBatch:
    lease = Lease(number, sample=number, prompt_ids=np.arange(3, dtype=np.int32), seed=number)
    one = Generated(np.arange(2, dtype=np.int32), np.zeros(2, np.float32), ((FIRST_VERSION, 0, 2),), "stop", "ab")
    rows, values = rollout_batch(lease, [one, one], [PIECES, PIECES]), np.array([0.0, 1.0], np.float32)
    return with_rewards(rows, Scored(values, {}, values, np.zeros(2, bool))) if scored else rows


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run of four groups a step that stands before stage 2."""
    made = Run.create(tmp_path / "run", parse_config({"groups_per_step": 4}), resume=False)
    for stage in ("data", "warmup", "stage1"):
        with made.stage(stage):
            pass
    return made


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The one line of a `rporec debug` that must fail, and leaves no folder `out` behind."""
    before = signal.getsignal(signal.SIGTERM)

    def command(*words: str | Path) -> str:
        assert cli.main(["debug", *map(str, words)]) == 2
        said = capsys.readouterr().err
        assert len(said.splitlines()) == 1, said
        assert not (tmp_path / "out").exists()
        return said

    yield command
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def learner(run: Run, tmp_path: Path, refused: Callable[..., str]) -> Callable[..., str]:
    """`rporec debug learner` on the folder `saved`."""
    return lambda *more: refused(
        "learner", run.folder, "--replay", tmp_path / "saved", "--out", tmp_path / "out", *more
    )


def test_groups_come_back_in_the_order_of_steps(tmp_path: Path) -> None:
    for step in (10, 9, 0):
        write_groups(tmp_path / f"step_{step}.parquet", [group(2 * step + 1), group(2 * step)])
    numbers = [one.column("group")[0].as_py() for one in saved_groups(tmp_path)]
    assert numbers == [1, 0, 19, 18, 21, 20]


def test_a_folder_without_groups_is_named(learner: Callable[..., str], tmp_path: Path) -> None:
    assert "saved: no such folder; `rporec debug rollouts` writes such a folder" in learner()
    (tmp_path / "saved").mkdir()
    assert "saved: no step_*.parquet in it" in learner()


def test_files_of_another_kind_are_named(learner: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "saved" / "step_0.parquet"
    path.parent.mkdir()
    path.write_text("step,loss\n")
    assert "step_0.parquet: not a Parquet file" in learner()
    pq.write_table(pa.Table.from_batches([group(0)]).drop_columns(["cot_tokens"]), path)
    assert "step_0.parquet: not groups as this version writes them: missing or of another type: cot_tokens" in learner()


def test_groups_without_scores_are_sent_to_the_reward_workers_first(
    learner: Callable[..., str], tmp_path: Path
) -> None:
    write_groups(tmp_path / "saved" / "step_0.parquet", [group(0), group(1, scored=False), group(2), group(3)])
    assert "saved: group 1 is not scored yet; first `rporec debug rewards" in learner()


def test_fewer_groups_than_a_step_or_than_asked_for_are_counted(learner: Callable[..., str], tmp_path: Path) -> None:
    write_groups(tmp_path / "saved" / "step_0.parquet", [group(number) for number in range(3)])
    assert "saved: 3 groups, where 1 × 4 (groups_per_step) are needed" in learner()
    write_groups(tmp_path / "saved" / "step_1.parquet", [group(number) for number in range(3, 8)])
    assert "8 groups, where 3 × 4 (groups_per_step) are needed; `rporec debug rollouts" in learner("--steps", "3")
    assert "--steps: 1 or more (got 0)" in learner("--steps", "0")


def test_a_stage_that_has_not_finished_and_a_folder_in_use_are_refused(
    run: Run, refused: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    assert "mine: exists and is not empty" in refused("rollouts", run.folder, "--out", tmp_path / "mine")
    assert "--groups: 1 or more" in refused("rollouts", run.folder, "--groups", "0", "--out", tmp_path / "out")
    (run.folder / "stages.json").unlink()
    assert "debug needs stage stage1" in refused("rewards", run.folder, "--replay", tmp_path)
