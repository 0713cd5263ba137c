"""Which model serves: folders under `RUN/promoted/`, each an LLM with the head it was judged by, and the one in use.

    promoted.json    {"current": version, "promotions": [{"version", "ndcg@10", "time"}, …]}, oldest first
    promoted/V/      model/ and head/ of version V; hard links where the disk has them

Training promotes what validation found better than all before; `rporec promote` does it by hand.
"""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rporec.config import ConfigError
from rporec.files import read_json, replacing, write_json
from rporec.run import Run

KEPT = 4  # newest promotions on disk: the current one, one that serving may still finish with, and two to go back to


@dataclass(frozen=True)
class Promoted:
    """A version that may serve."""

    version: str
    folder: Path

    @classmethod
    def of(cls, run: Run, version: str) -> Promoted:
        """Whether it is there or not."""
        return cls(version, run.folder / "promoted" / version)

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def head(self) -> Path:
        return self.folder / "head"


def promoted(run: Run) -> Promoted | None:
    """The version in use; None before the first promotion."""
    state = _state(run)
    return Promoted.of(run, state["current"]) if state["promotions"] else None


def better(run: Run, ndcg: float, min_gain: float = 0.0) -> bool:
    """Whether a validation NDCG@10 exceeds that of every promotion by more than `min_gain`; a tie never does."""
    known = [one["ndcg@10"] for one in _state(run)["promotions"] if one["ndcg@10"] is not None]
    return not known or ndcg > max(known) + min_gain


def promote(run: Run, version: str, model: Path, ndcg: float | None) -> Promoted:
    """Have a model folder serve, with the run's head.

    A version whose folder is still there is used again; it keeps its NDCG@10 where the new one is None.
    """
    state = _state(run)
    chosen = Promoted.of(run, version)
    if not chosen.folder.exists():
        with replacing(chosen.folder) as temporary:
            shutil.copytree(model, temporary / "model", copy_function=_link)
            shutil.copytree(run.head(), temporary / "head", copy_function=_link)
    others = [one for one in state["promotions"] if one["version"] != version]
    if ndcg is None:
        ndcg = next((one["ndcg@10"] for one in state["promotions"] if one["version"] == version), None)
    entry = {"version": version, "ndcg@10": ndcg, "time": round(time.time(), 3)}
    _commit(run, {"current": version, "promotions": [*others, entry]})
    return chosen


def promote_best(run: Run) -> Promoted:
    """Have the best version of stage 2 serve, or without one the LLM before RL."""
    run.require("stage1", "promote")
    best = read_json(run.folder / "best.json")
    if best is None or not run.best_model.is_dir():
        return promote(run, "0.0", run.warm_model, None)
    return promote(run, f"{best['attempt']}.{best['version']}", run.best_model, best["ndcg@10"])


def make_servable(run: Run) -> None:
    """Have the best version serve unless one does already. ConfigError for a run that has nothing to serve."""
    run.require("stage1", "serve")
    run.require_head("serve")
    if promoted(run) is None:
        promote_best(run)


def roll_back(run: Run) -> Promoted:
    """Have the version serve that was promoted before the current one. ConfigError when there is none."""
    state = _state(run)
    versions = [one["version"] for one in state["promotions"]]
    place = versions.index(state["current"]) if versions else 0
    if place == 0 or not (earlier := Promoted.of(run, versions[place - 1])).folder.exists():
        raise ConfigError(f"{run.folder}: no earlier promotion to go back to")
    _commit(run, state | {"current": earlier.version})
    return earlier


def _state(run: Run) -> dict[str, Any]:
    return read_json(run.folder / "promoted.json", {"current": None, "promotions": []})


def _commit(run: Run, state: dict[str, Any]) -> None:
    write_json(run.folder / "promoted.json", state)
    kept = {state["current"], *(one["version"] for one in state["promotions"][-KEPT:])}
    for folder in (run.folder / "promoted").iterdir():
        if folder.name not in kept and not folder.name.startswith("."):
            shutil.rmtree(folder)


def _link(source: str, target: str) -> None:
    source = os.path.realpath(source)  # models of the hub are folders of links, which lead nowhere from elsewhere
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without hard links
        shutil.copy2(source, target)
