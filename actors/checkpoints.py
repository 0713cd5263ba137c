"""Checkpoints of stage 2: the ranks write their part, the controller adds the rest and commits by rename.

learner/, rng/     of the ranks: weights, optimiser and schedule; random states
controller.json    the ledger, and the hashes of the RecHead that scored
groups.parquet     rows of the groups that wait to be consumed
config.json        resolved config
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from rporec.config import Config, ConfigError
from rporec.files import digest, read_json, write_json
from rporec.rl.rollout_schema import read_groups, write_groups
from rporec.run import Run, contradiction, read_config

KEPT = 2  # the newest ones


def partial(run: Run, step: int) -> Path:
    """Where the checkpoint of `step` is written before it counts."""
    return run.checkpoints / f"step_{step}.tmp"


def begin(run: Run, step: int) -> None:
    """An empty folder for the parts of a checkpoint, also after a run that was killed while it wrote one."""
    shutil.rmtree(partial(run, step), ignore_errors=True)
    partial(run, step).mkdir(parents=True)


def committed(run: Run) -> list[int]:
    """Steps of the committed checkpoints, oldest first."""
    names = [path.name for path in run.checkpoints.glob("step_*") if not path.name.endswith(".tmp")]
    return sorted(int(name.removeprefix("step_")) for name in names)


def newest(run: Run) -> Path | None:
    steps = committed(run)
    return run.checkpoints / f"step_{steps[-1]}" if steps else None


def add_ledger(run: Run, config: Config, step: int, ledger: dict[str, Any], groups: Sequence[pa.RecordBatch]) -> None:
    """The controller's part: the ledger's snapshot, the rows of the groups whose ids it lists, what both rest on."""
    folder = partial(run, step)
    write_json(folder / "controller.json", {"step": step, "ledger": ledger, "head": _head_version(run)})
    write_groups(folder / "groups.parquet", groups)
    write_json(folder / "config.json", config.model_dump(mode="json"))


def read_ledger(folder: Path) -> tuple[int, dict[str, Any], dict[int, pa.RecordBatch]]:
    """(step, snapshot, rows by group id) of a committed checkpoint."""
    state = read_json(folder / "controller.json")
    groups = read_groups(folder / "groups.parquet")
    return state["step"], state["ledger"], {group.column("group")[0].as_py(): group for group in groups}


def check(run: Run, config: Config) -> None:
    """ConfigError when the newest checkpoint cannot go on under `config`, or was scored by another RecHead."""
    folder = newest(run)
    if folder is None:
        return
    key = contradiction(read_config(folder / "config.json"), config)
    if key is not None:
        raise ConfigError(f"{folder}: made with another {key}; start a new run for that")
    scored, found = read_json(folder / "controller.json")["head"], _head_version(run)
    for name in sorted(scored.keys() | found.keys()):
        if scored.get(name) != found.get(name):
            raise ConfigError(
                f"{run.head() / name}: not of the RecHead that scored up to {folder.name}, so rewards would change; "
                "put that one back, or start a new run"
            )


def _head_version(run: Run) -> dict[str, str]:
    """Hash of each of the RecHead's files."""
    return {path.name: digest(path) for path in sorted(run.head().glob("*"))}


def commit(run: Run, step: int) -> None:
    """Make the checkpoint of `step` the newest; forget old ones, and halves of a run that was killed while it wrote."""
    folder = run.checkpoints / f"step_{step}"
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(partial(run, step), folder)
    for old in committed(run)[:-KEPT]:
        shutil.rmtree(run.checkpoints / f"step_{old}")
    for left in run.checkpoints.glob("step_*.tmp"):
        shutil.rmtree(left)
