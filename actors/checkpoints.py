"""Checkpoints of the LLM in training: the ranks write their part, and what is whole counts by a rename.

learner/, rng/     of the ranks: weights, optimiser and schedule; random states

In stage 2 under the controller, which then is the one who commits, also:
controller.json    the ledger, and the hashes of the RecHead that scored
groups.parquet     rows of the groups that wait to be consumed
config.json        resolved config
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from rporec.config import Config, ConfigError
from rporec.files import digest, read_json, sync, sync_tree, write_json
from rporec.rl.rollout_schema import read_groups, write_groups
from rporec.run import Run, contradiction, read_config

KEPT = 2  # the newest ones


class Learns(Protocol):
    """What has a checkpoint; all ranks call together."""

    def save_checkpoint(self, folder: Path) -> None: ...

    def load_checkpoint(self, folder: Path) -> None: ...


def place(folder: Path, step: int) -> Path:
    """Of the committed checkpoint of `step`."""
    return folder / f"step_{step}"


def partial(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` is written before it counts."""
    return folder / f"step_{step}.tmp"


def begin(folder: Path, step: int) -> None:
    """An empty folder for the parts of a checkpoint, also after a run that was killed while it wrote one."""
    shutil.rmtree(partial(folder, step), ignore_errors=True)
    partial(folder, step).mkdir(parents=True)


def committed(folder: Path) -> list[int]:
    """Steps of the committed checkpoints, oldest first."""
    names = [path.name for path in folder.glob("step_*") if not path.name.endswith(".tmp")]
    return sorted(int(name.removeprefix("step_")) for name in names)


def newest(folder: Path) -> int | None:
    """The step of the newest committed checkpoint."""
    return max(committed(folder), default=None)


def commit(folder: Path, step: int) -> None:
    """Make the checkpoint of `step` the newest; forget old ones, and halves of a run that was killed while it wrote.

    Waits until its bytes are on the disk: one that counts, and is empty after a power loss, would hide the older one.
    """
    sync_tree(partial(folder, step))
    if place(folder, step).exists():
        shutil.rmtree(place(folder, step))
    os.replace(partial(folder, step), place(folder, step))
    sync(folder)
    for old in committed(folder)[:-KEPT]:
        shutil.rmtree(place(folder, old))
    for left in folder.glob("step_*.tmp"):
        shutil.rmtree(left)


def require_whole(folder: Path, step: int) -> None:
    """ConfigError when files of the checkpoint of `step` are empty or torn; names the newest older one that is whole."""
    if (fault := _fault(place(folder, step))) is None:
        return
    older = [one for one in committed(folder) if one < step and _fault(place(folder, one)) is None]
    rest = f"--resume goes on from {place(folder, older[-1]).name}" if older else "none is whole: --resume begins anew"
    raise ConfigError(f"{place(folder, step)}: cannot be read ({fault}); delete this folder, and {rest}")


def _fault(folder: Path) -> str | None:
    """What of a committed checkpoint a power loss took, as far as it shows without loading weights."""
    for path in sorted(folder.rglob("*")):
        part = path.relative_to(folder)
        if part.parts[0] != "universal" and path.is_file() and not path.stat().st_size:  # that one is made anew
            return f"{part} is empty"
    try:
        for path in folder.glob("*.json"):
            json.loads(path.read_bytes())
        for path in folder.glob("*.parquet"):
            pq.read_metadata(path)
    except (ValueError, OSError) as error:  # Arrow's are of both
        return f"{path.name}: {' '.join(str(error).split())}"
    return None


# --- the ranks' part -------------------------------------------------------------------------
def resume(folder: Path, learner: Learns) -> int:
    """Load the newest checkpoint, if there is one; returns the steps behind it. All ranks call together.

    Raises ConfigError when its files are empty or torn.
    """
    from rporec.models.trainable import from_rank_0

    step = from_rank_0(newest(folder))  # a late commit may fall between two ranks' looks
    if step is None:
        return 0
    require_whole(folder, step)
    learner.load_checkpoint(place(folder, step))
    return step


def save(folder: Path, step: int, learner: Learns, committing: Callable[[], None] | None = None) -> None:
    """Every rank writes its part, then rank 0 commits: as `committing` does, or by itself. All ranks call together."""
    import torch.distributed as dist

    if dist.get_rank() == 0:
        begin(folder, step)
    dist.barrier()
    learner.save_checkpoint(partial(folder, step))
    dist.barrier()
    if dist.get_rank() == 0:
        committing() if committing else commit(folder, step)


# --- the controller's part -------------------------------------------------------------------


def add_ledger(run: Run, config: Config, step: int, ledger: dict[str, Any], groups: Sequence[pa.RecordBatch]) -> None:
    """The controller's part: the ledger's snapshot, the rows of the groups whose ids it lists, what both rest on.

    Waits for the disk, so that `commit`, which the controller's loop waits for, need not.
    """
    folder = partial(run.checkpoints, step)
    write_json(folder / "controller.json", {"step": step, "ledger": ledger, "head": _head_version(run)})
    write_groups(folder / "groups.parquet", groups)
    write_json(folder / "config.json", config.model_dump(mode="json"))
    sync_tree(folder)


def read_ledger(folder: Path) -> tuple[int, dict[str, Any], dict[int, pa.RecordBatch]]:
    """(step, snapshot, rows by group id) of a committed checkpoint."""
    state = read_json(folder / "controller.json")
    groups = read_groups(folder / "groups.parquet")
    return state["step"], state["ledger"], {group.column("group")[0].as_py(): group for group in groups}


def check(run: Run, config: Config) -> None:
    """ConfigError when the newest checkpoint cannot be read, or go on under `config`, or was scored by another RecHead."""
    step = newest(run.checkpoints)
    if step is None:
        return
    require_whole(run.checkpoints, step)
    folder = place(run.checkpoints, step)
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
