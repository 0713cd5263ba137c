"""The run directory: everything that a training produced and from which it resumes.

config.json        resolved config               stages.json      finished stages and what they cost
run.json           cluster of a live run         status.json      the controller's last word
lock               held by the training that writes here
data/              the data set (or a pointer)   backbone/        the starting LLM
rationales/        the teacher's texts           warmup/model/    the LLM before RL
completions/       what the LLM wrote, by stage  head/ …          RecHeads
checkpoints/       of stage 2                    best/            the LLM that validation picked
promoted/          versions that may serve       promoted.json    which one does
feedback/          what users did                items/           items added while serving
baselines/         tuned and fitted baselines
rollouts/          what each step consumed, with `save_rollouts`
steps.jsonl, validation.jsonl, metrics.json, ranks.parquet, rollouts.json, report.html
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rporec.config import Config, ConfigError, parse_config
from rporec.files import read_json, recover, write_json

STAGES = ("data", "warmup", "stage1", "stage2", "evaluate")


# What a mount says that knows no locks, as some of Lustre and of object storage do.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


class RunError(RuntimeError):
    """A training that cannot go on; the message is one line that says what happened and where its log is."""


@dataclass(frozen=True)
class Run:
    """Paths and bookkeeping of one run directory."""

    folder: Path

    # --- opening -----------------------------------------------------------------------------
    @classmethod
    def create(cls, folder: Path, config: Config, *, resume: bool) -> Run:
        """Open `folder` for a training; refuses a folder that holds a run unless `resume`.

        A resumed run keeps its config: a key that contradicts it is an error that names the key.
        """
        run = cls(folder.absolute())  # actors have other working directories
        held = read_json(run.config_path)
        if held is None:
            if resume:
                raise ConfigError(f"{folder}: no run to resume here (no config.json); start it without --resume")
            if folder.exists() and any(folder.iterdir()):
                raise ConfigError(f"{folder}: not empty and not a run; choose another --run folder")
            folder.mkdir(parents=True, exist_ok=True)
            write_json(run.config_path, config.model_dump(mode="json"))
            return run
        if not resume:
            raise ConfigError(f"{folder}: holds a run already; add --resume to go on with it, or choose another --run")
        key = contradiction(run.config(), config)
        if key is not None:
            raise ConfigError(
                f"{folder}: --resume with another {key} than the run began with; start a new run for that"
            )
        return run

    @contextmanager
    def locked(self) -> Iterator[None]:
        """For the one training that writes here; ConfigError while another process holds the run, on any machine."""
        path = self.folder / "lock"
        with path.open("a+", encoding="utf-8") as file:
            try:
                # The kernel frees it when its process ends, however that ends, and a shared file system when its
                # machine is lost: a file that merely exists would stop every resume after a crash on another host.
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise ConfigError(
                    f"{self.folder}: {holder} trains it; stop that one or wait for its end "
                    f"(should it be gone with its machine, delete {path})"
                ) from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            recover(self.best_model)  # of gigabytes, and a kill while it is written is nothing unusual
            yield  # the file stays: another process may have opened it already, and would lock what nobody sees

    def discard_if_empty(self) -> None:
        """Remove a run of which not even the data set came about, so that the next try may have its folder."""
        if not self.finished("data") and not self.data.exists():
            shutil.rmtree(self.folder, ignore_errors=True)

    @classmethod
    def open(cls, folder: Path) -> Run:
        """Open an existing run; ConfigError when there is none or it is half-written."""
        if not folder.is_dir():
            raise ConfigError(f"{folder}: no such run; `rporec train CONFIG --run {folder}` makes one")
        if not (folder / "config.json").is_file():
            raise ConfigError(f"{folder}: not a run directory (no config.json)")
        return cls(folder.absolute())

    def require_here(self) -> None:
        """Raises RunError on a machine that does not see the folder, as a node without the shared storage."""
        if not self.config_path.is_file():
            raise RunError(
                f"{self.folder} is not on node {socket.gethostname()}; put --run on storage that all nodes see"
            )

    def config(self) -> Config:
        """What the run began with."""
        return read_config(self.config_path)

    def status(self) -> dict[str, Any]:
        """The controller's last word; {} before its first, and where a power loss took it: it waits for no disk."""
        try:
            return read_json(self.folder / "status.json", {})
        except ConfigError:
            return {}

    # --- paths -------------------------------------------------------------------------------
    @property
    def config_path(self) -> Path:
        return self.folder / "config.json"

    @property
    def data(self) -> Path:
        """The built data set: `data/` itself, or where `data.json` points."""
        pointer = read_json(self.folder / "data.json")
        return Path(pointer["path"]) if pointer else self.folder / "data"

    @property
    def backbone(self) -> Path:
        return self.folder / "backbone"

    @property
    def warm_model(self) -> Path:
        """The LLM before RL: after warm-up, or the backbone when there was none."""
        warm = self.folder / "warmup" / "model"
        return warm if warm.is_dir() else self.backbone

    @property
    def best_model(self) -> Path:
        """The checkpoint that validation picked in stage 2."""
        return self.folder / "best"

    def completions(self, stage: str, part: str) -> Path:
        return self.folder / "completions" / stage / part

    def head(self, name: str = "head") -> Path:
        return self.folder / name

    @property
    def feedback(self) -> Path:
        """Parquet parts that `rporec data build --interactions` reads."""
        return self.folder / "feedback"

    @property
    def added_items(self) -> Path:
        return self.folder / "items"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def rollouts(self, step: int) -> Path:
        """The groups that a learner step consumed, in order; there with `save_rollouts` only."""
        return self.folder / "rollouts" / f"step_{step}.parquet"

    @property
    def steps(self) -> Path:
        return self.folder / "steps.jsonl"

    @property
    def validation(self) -> Path:
        return self.folder / "validation.jsonl"

    # --- stages ------------------------------------------------------------------------------
    def finished(self, stage: str) -> bool:
        return stage in read_json(self.folder / "stages.json", {})

    def require(self, stage: str, command: str) -> None:
        if not self.finished(stage):
            raise ConfigError(
                f"{self.folder}: {command} needs stage {stage}, which has not finished; train with --resume"
            )

    def require_head(self, command: str) -> None:
        """ConfigError where the run's recipe trains no RecHead to answer by."""
        if (recipe := self.config().recipe) != "rporec":
            raise ConfigError(f"{self.folder}: {command} answers by a RecHead, and recipe {recipe} has none")

    @contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        """Time a stage; what the block puts into the yielded dict is kept beside its cost."""
        began = time.monotonic()
        notes: dict[str, Any] = {}
        yield notes
        stages = read_json(self.folder / "stages.json", {})
        stages[name] = {
            "seconds": round(time.monotonic() - began, 2),
            **notes,
        }
        write_json(self.folder / "stages.json", stages)


def read_config(path: Path) -> Config:
    """A resolved config. Raises ConfigError when it is missing, damaged or of another version's making."""
    if (held := read_json(path)) is None:
        raise ConfigError(f"{path}: missing; restore it, or remove the folder that should hold it")
    try:
        return parse_config(held)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


# A resumed run may go on longer or on more machines; what shaped its data and weights stays.
_MAY_CHANGE = {
    "name",
    "device",
    "steps",
    "rollout_workers",
    "reward_workers",
    "learners",
    "checkpoint_every",
    "weight_transfer",
    "evaluate",
    "rere.more_beams",
    "warmup.checkpoint_every",
    # What memory or patience runs out of: a run must be able to go on with other values.
    "engine.kv_cache_mb",
    "engine.max_num_seqs",
    "engine.gpu_share",
    "engine.args.gpu_memory_utilization",
    "engine.args.kv_cache_memory_bytes",
    "engine.timeout",
    "deepspeed.gpu_share",
    "reward.gpu_share",
    "reward.timeout",
    "promotion",
    "serve",
}


def contradiction(held: Config, wanted: Config, may_change: Collection[str] = _MAY_CHANGE) -> str | None:
    """The first key (dotted) in which `wanted` cannot go on with what was made with `held`."""
    return _first_difference(held.model_dump(mode="json"), wanted.model_dump(mode="json"), may_change)


def _first_difference(
    held: dict[str, Any], wanted: dict[str, Any], may_change: Collection[str], prefix: str = ""
) -> str | None:
    for key in sorted(set(held) | set(wanted)):
        if f"{prefix}{key}" in may_change:
            continue
        ours, theirs = held.get(key), wanted.get(key)
        if isinstance(ours, dict) and isinstance(theirs, dict):
            inner = _first_difference(ours, theirs, may_change, f"{prefix}{key}.")
            if inner:
                return inner
        elif ours != theirs:
            return f"{prefix}{key}"
    return None
