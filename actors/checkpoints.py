"""Checkpoints of stage 2: the ranks write their part, the controller adds the ledger and commits by rename."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from rporec.files import read_json, write_json
from rporec.rl.rollout_schema import read_groups, write_groups
from rporec.run import Run

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


def add_ledger(run: Run, step: int, ledger: dict[str, Any], groups: Sequence[pa.RecordBatch]) -> None:
    """The controller's part: the ledger's snapshot, and the rows of the groups whose ids it lists."""
    write_json(partial(run, step) / "controller.json", {"step": step, "ledger": ledger})
    write_groups(partial(run, step) / "groups.parquet", groups)


def read_ledger(folder: Path) -> tuple[int, dict[str, Any], dict[int, pa.RecordBatch]]:
    """(step, snapshot, rows by group id) of a committed checkpoint."""
    state = read_json(folder / "controller.json")
    groups = read_groups(folder / "groups.parquet")
    return state["step"], state["ledger"], {group.column("group")[0].as_py(): group for group in groups}


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
