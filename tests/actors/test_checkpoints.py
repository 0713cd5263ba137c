"""What a checkpoint of stage 2 refuses to go on with."""

from __future__ import annotations

from pathlib import Path

import pytest

from actors import checkpoints
from rporec.config import ConfigError, parse_config
from rporec.models import trainable
from rporec.run import Run

CONFIG = parse_config({"steps": 8, "groups_per_step": 8})


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run whose newest checkpoint is that of step 4."""
    run = Run.create(tmp_path / "run", CONFIG, resume=False)
    run.head().mkdir()
    (run.head() / "head.json").write_text("{}")
    (run.head() / "head.safetensors").write_bytes(b"weights")
    checkpoints.begin(run.checkpoints, 4)
    checkpoints.add_ledger(run, CONFIG, 4, {}, [])
    checkpoints.commit(run.checkpoints, 4)
    return run


def test_it_goes_on_under_what_may_change(run: Run) -> None:
    checkpoints.check(run, CONFIG)
    changes = {"steps": 20, "learners": 4, "rollout_workers": 3, "checkpoint_every": 1}
    checkpoints.check(run, parse_config({"groups_per_step": 8, **changes}))


def test_a_run_without_a_checkpoint_has_nothing_to_contradict(tmp_path: Path) -> None:
    checkpoints.check(Run.create(tmp_path / "run", CONFIG, resume=False), parse_config({"seed": 1}))


def test_it_names_the_key_that_it_was_made_with_another_of(run: Run) -> None:
    """Of the config that the steps were made with, also when someone has changed the run's file since."""
    with pytest.raises(ConfigError, match=r"step_4: made with another rl\.lr;"):
        checkpoints.check(run, parse_config({"steps": 8, "groups_per_step": 8, "rl": {"lr": 1e-3}}))


@pytest.mark.parametrize("name", ["head.json", "head.safetensors"])
def test_it_names_the_file_of_another_rechead(run: Run, name: str) -> None:
    (run.head() / name).write_bytes(b"another")
    with pytest.raises(ConfigError, match=f"head/{name}: not of the RecHead that scored up to step_4"):
        checkpoints.check(run, CONFIG)
    (run.head() / name).unlink()
    with pytest.raises(ConfigError, match=f"head/{name}: not of the RecHead"):
        checkpoints.check(run, CONFIG)


# --- after a power loss ----------------------------------------------------------------------
def again(run: Run, step: int) -> Path:
    """Another checkpoint, with a part of a rank; returns its folder."""
    checkpoints.begin(run.checkpoints, step)
    part = checkpoints.partial(run.checkpoints, step) / "learner" / "rank_0.pt"
    part.parent.mkdir()
    part.write_bytes(b"weights")
    checkpoints.add_ledger(run, CONFIG, step, {}, [])
    checkpoints.commit(run.checkpoints, step)
    return checkpoints.place(run.checkpoints, step)


class Learner:
    def save_checkpoint(self, folder: Path) -> None:
        raise NotImplementedError

    def load_checkpoint(self, folder: Path) -> None:
        raise AssertionError("loads what is torn")


@pytest.mark.parametrize("name", ["learner/rank_0.pt", "controller.json", "groups.parquet", "config.json"])
def test_a_torn_checkpoint_names_the_folder_to_delete_and_the_one_that_is_whole(run: Run, name: str) -> None:
    folder = again(run, 8)
    checkpoints.check(run, CONFIG)
    (folder / name).write_bytes(b"")
    words = rf"step_8: cannot be read \({name} is empty\); delete this folder, and --resume goes on from step_4"
    with pytest.raises(ConfigError, match=words):
        checkpoints.check(run, CONFIG)
    if name.startswith("learner"):
        return  # of the rest it shows before weights are loaded
    (folder / name).write_bytes(b"PAR1{")
    with pytest.raises(ConfigError, match=rf"step_8: cannot be read \({name}: .*goes on from step_4"):
        checkpoints.check(run, CONFIG)


def test_ranks_refuse_a_torn_checkpoint_where_no_older_one_is_whole(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainable, "from_rank_0", lambda value: value)
    for folder in (checkpoints.place(run.checkpoints, 4), again(run, 8)):
        (folder / "groups.parquet").write_bytes(b"")
    with pytest.raises(ConfigError, match="delete this folder, and none is whole: --resume begins anew"):
        checkpoints.resume(run.checkpoints, Learner())


def test_what_a_conversion_left_half_done_is_no_fault(run: Run) -> None:
    left = again(run, 8) / "universal" / "zero"
    left.mkdir(parents=True)
    (left / "half.pt").touch()
    checkpoints.check(run, CONFIG)


def test_a_checkpoint_is_on_the_disk_before_it_counts(run: Run, disk: list[str]) -> None:
    """Also those of warm-up and of preferences, which have the ranks' part alone."""
    checkpoints.begin(run.checkpoints, 8)
    part = checkpoints.partial(run.checkpoints, 8) / "learner"
    part.mkdir()
    (part / "rank_0.pt").write_bytes(b"weights")
    checkpoints.commit(run.checkpoints, 8)
    folder = checkpoints.place(run.checkpoints, 8)
    named = disk.index(f"rename {folder}")
    for path in (folder / "learner/rank_0.pt", folder / "learner", folder):
        written = f"{folder}.tmp{str(path).removeprefix(str(folder))}"
        assert f"sync {written}" in disk[:named], path
    assert f"sync {run.checkpoints}" in disk[named:]
