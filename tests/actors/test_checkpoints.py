"""What a checkpoint of stage 2 refuses to go on with."""

from __future__ import annotations

from pathlib import Path

import pytest

from actors import checkpoints
from rporec.config import ConfigError, parse_config
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
