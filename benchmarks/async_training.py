"""Stage 2 asynchronous against synchronous: the real engines, one fixed core for rollouts and one for the learner.

    rporec bench async [--json]

Both train copies of one warmed-up model for the same number of steps of the same groups; only `max_staleness`
differs, 1 against 0. Everything runs on two cores: the rollout worker keeps to one, the learner to the other, and
reward worker, controller and Ray take their time from both. In a synchronous run one core is always free for
them, so what they cost shows in the asynchronous one alone: it is part of what is measured.

Left out are the first steps, in which the processes warm up, and the last, which has no next one to overlap with.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from scipy import stats

from benchmarks.result import machine, result
from rporec.config import parse_config
from rporec.files import read_json, read_lines, write_json
from rporec.report.live import Progress, progress
from rporec.run import Run, RunError

STEPS, WARMING = 30, 3
QUICK = {"order": ("sync", "async"), "steps": 10}
ORDER = ("sync", "async", "async", "sync")  # so that a machine that slows down or heats up favours neither
STALENESS = {"sync": 0, "async": 1}
# A million parameters. With `max_num_seqs` the engine writes a step's groups in about the time that training on them takes.
SETTINGS: dict[str, Any] = {
    "name": "async",
    "data": {
        "window": 8,
        "synthetic": {"users": 600, "series": 24, "volumes": 4, "genres": 4, "studios": 6, "length": 10},
    },
    "tiny": {"vocabulary": 1024, "context": 192},
    "teacher": {"decision": True},
    "warmup": {"steps": 240, "batch_size": 16, "lr": 6e-3},
    "sampling": {"max_tokens": 48},
    "head": {"epochs": 4, "lr": 2e-3, "dim": 32},
    "engine": {"max_num_seqs": 48},
    "groups_per_step": 48,
    "steps": STEPS,
    "checkpoint_every": 10_000,
    "max_head_samples": 600,
    "max_eval_samples": 60,
    "eval_samples": 0,
    "rl": {"validate_every": 10_000, "validate_samples": 16},
}

Steps = Sequence[dict[str, Any]]  # the lines of one steps.jsonl


@dataclass(frozen=True)
class Pace:
    """Wall seconds of one run's timed steps."""

    total: float
    waiting: float  # the learner's, for groups

    @classmethod
    def of(cls, steps: Steps) -> Pace:
        seconds = [step["seconds"] for step in steps[WARMING:-1]]
        return cls(sum(one["total"] for one in seconds), sum(one["wait"] for one in seconds))

    @property
    def learning(self) -> float:
        return self.total - self.waiting


def compare(sync: Sequence[Steps], asynchronous: Sequence[Steps]) -> dict[str, Any]:
    """The ratios, of one run or more of each kind, all with the same number of steps; medians over runs.

    A synchronous learner waits exactly while its groups are written and scored, so its runs give both times of
    `possible`: (T_rollout + T_learner) / max(T_rollout, T_learner).
    """
    in_turn, overlapped = [Pace.of(steps) for steps in sync], [Pace.of(steps) for steps in asynchronous]
    rollout = median(pace.waiting for pace in in_turn)
    learner = median(pace.learning for pace in in_turn)
    scoring = median(_scoring(steps) for steps in sync)
    possible = (rollout + learner) / max(rollout, learner)
    faster = median(pace.total for pace in in_turn) / median(pace.total for pace in overlapped)
    low, high = reward_interval(sync, asynchronous)
    reward_sync, reward_async = (float(np.mean(last_rewards(runs))) for runs in (sync, asynchronous))
    return {
        "async_over_sync": round(faster, 3),
        "possible": round(possible, 3),
        "share_of_possible": round(faster / possible, 3),
        "rollout_over_learner": round(rollout / learner, 3),
        "learner_idle": round(median(pace.waiting / pace.total for pace in overlapped), 3),
        "rollout_idle": _rollout_idle(asynchronous),
        "dropped_stale": round(median(_stale(steps) for steps in asynchronous), 4),
        "reward_sync": round(reward_sync, 4),
        "reward_async": round(reward_async, 4),
        "reward_difference": round(reward_async - reward_sync, 4),
        "reward_difference_ci": [round(low, 4), round(high, 4)],
        "reward_share": round(scoring / (rollout - scoring), 4),
    }


def last_rewards(runs: Sequence[Steps]) -> np.ndarray:
    """[runs, steps]: mean reward of each step in the last third."""
    return np.array([[step["reward_mean"] for step in steps[-(len(steps) // 3) :]] for steps in runs])


def reward_interval(sync: Sequence[Steps], asynchronous: Sequence[Steps]) -> tuple[float, float]:
    """95 % of the difference async − sync, by Student's t over the steps of the last third.

    Step by step, for a step consumes nearly the same prompts in all runs. It covers the noise of sampling
    within these runs, not that of other seeds.
    """
    differences = last_rewards(asynchronous).mean(axis=0) - last_rewards(sync).mean(axis=0)
    count = len(differences)
    margin = stats.t.ppf(0.975, count - 1) * differences.std(ddof=1) / math.sqrt(count)
    return float(differences.mean() - margin), float(differences.mean() + margin)


def _scoring(steps: Steps) -> float:
    """Seconds in which the reward worker had groups: when synchronous, after the last of a step is written."""
    return sum(step["reward_worker_busy"] * step["seconds"]["total"] for step in steps[WARMING:-1])


def _stale(steps: Steps) -> float:
    """Share of the written groups that had grown too old before a step came for them."""
    dropped = steps[-1]["dropped"].get("stale", 0)
    return dropped / (dropped + len(steps) * SETTINGS["groups_per_step"])


def _rollout_idle(runs: Sequence[Steps]) -> float | None:
    """Share of the rollout worker's slots that stood empty; None when no step was long enough to be looked at."""
    loads = [step["loads"]["rollout"] for steps in runs for step in steps[WARMING:-1] if step["loads"]]
    return round(float(np.mean([max(0.0, 1.0 - load) for load in loads])), 3) if loads else None


# --- running -----------------------------------------------------------------------------------
def run(order: Sequence[str] = ORDER, steps: int = STEPS) -> dict[str, Any]:
    before, console = machine(), Console(stderr=True)
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        raise RunError("rporec bench async: needs two cores, one each for rollouts and learner; this process may use 1")
    taken: dict[str, list[Steps]] = {"sync": [], "async": []}
    cpu: dict[str, list[float]] = {"sync": [], "async": []}
    with tempfile.TemporaryDirectory(prefix="rporec-bench-") as scratch:
        warm = _before_stage2(Path(scratch), console)
        for number, kind in enumerate(order):
            title = f"{kind}, run {number + 1} of {len(order)}"
            trained = _stage2(warm, Path(scratch) / str(number), kind, steps, cores, title, console)
            taken[kind].append(read_lines(trained.steps))
            cpu[kind].append(read_json(trained.folder / "stages.json")["stage2"]["cpu_seconds"])
    return result(
        "async",
        compare(taken["sync"], taken["async"]),
        {kind: median(Pace.of(run).total for run in runs) for kind, runs in taken.items()},
        {kind: median(seconds) for kind, seconds in cpu.items()},
        machine=before,
        timed_steps=steps - WARMING - 1,
    )


def _before_stage2(scratch: Path, console: Console) -> Run:
    """Data, warm-up and RecHead, once for all runs."""
    write_json(scratch / "config.json", parse_config(SETTINGS).model_dump(mode="json"))
    run = Run(scratch / "warm")
    with progress("data, warm-up, stage 1", total=3, console=console) as bar:
        _train(scratch / "config.json", run, ["--stages", "data,warmup,stage1"], lambda: _count_stages(run, bar))
    return run


def _stage2(warm: Run, folder: Path, kind: str, steps: int, cores: list[int], title: str, console: Console) -> Run:
    """Stage 2 on a copy of the run, whose processes may use `cores` only."""
    shutil.copytree(warm.folder, folder, ignore=shutil.ignore_patterns("ray"))
    run = Run(folder)
    write_json(run.config_path, read_json(run.config_path) | {"max_staleness": STALENESS[kind], "steps": steps})
    with progress(title, total=steps, console=console) as bar:
        _train(
            run.config_path, run, ["--resume", "--stages", "stage2"], lambda: _count_steps(run, bar), cores=set(cores)
        )
    return run


def _count_stages(run: Run, bar: Progress) -> None:
    bar.update(len(read_json(run.folder / "stages.json", {})))


def _count_steps(run: Run, bar: Progress) -> None:
    if done := read_lines(run.steps):
        waited = sum(step["seconds"]["wait"] for step in done) / sum(step["seconds"]["total"] for step in done)
        bar.update(len(done), note=f"learner waits {waited:.0%}")


def _train(config: Path, run: Run, words: list[str], watch: Any, cores: set[int] | None = None) -> None:
    """`rporec train` as a process of its own; RunError with its last words when it fails."""
    command = [sys.executable, "-m", "rporec.cli", "train", str(config), "--run", str(run.folder), *words]
    log = run.folder.with_suffix(".log")
    confine = (lambda: os.sched_setaffinity(0, cores)) if cores else None
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, preexec_fn=confine)
        try:
            while process.poll() is None:
                time.sleep(1.0)
                watch()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(60)
    if process.returncode:
        raise RunError(f"rporec bench async: {' '.join(words)} failed: {' '.join(log.read_text()[-600:].split())}")
