"""A training as a process of its own: watched by its files, killed in part, counted at its end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trained_run import SMALL, kill_all

from rporec.files import read_json, read_lines

STEPS, GROUPS = 14, 8
CONFIG = f"""
{SMALL}
name: chaos
head: {{epochs: 2, lr: 2e-3, dim: 32}}
max_staleness: 1
groups_per_step: {GROUPS}
steps: {STEPS}
checkpoint_every: 4
rollout_workers: 2
reward_workers: 2
max_eval_samples: 60
eval_samples: 0
reward: {{timeout: 20}}
rl: {{validate_every: 5, validate_samples: 32}}
"""


def rporec(*words: str) -> list[str]:
    return [sys.executable, "-m", "rporec.cli", *words]


@dataclass
class LiveRun:
    """Stage 2 as a process of its own."""

    folder: Path
    process: subprocess.Popen
    log: Path

    @property
    def status(self) -> dict[str, Any]:
        return read_json(self.folder / "status.json", {})

    @property
    def steps(self) -> list[dict[str, Any]]:
        return read_lines(self.folder / "steps.jsonl")

    def wait(self, until: Callable[[dict[str, Any]], bool], seconds: float = 180.0) -> dict[str, Any]:
        """The first status for which `until` holds."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if (status := self.status) and until(status):
                return status
            assert self.process.poll() is None, self.output()
            time.sleep(0.1)
        raise AssertionError(f"waited {seconds} s in vain; last status {self.status}\n{self.output()}")

    def at_step(self, step: int) -> dict[str, Any]:
        return self.wait(lambda status: status["state"] == "RUNNING" and status["step"] >= step)

    def pid_of(self, role: str) -> int:
        status = self.wait(lambda status: any(one["role"] == role for one in status["actors"]))
        return next(one["pid"] for one in status["actors"] if one["role"] == role and one["state"] == "ALIVE")

    def kill(self, role: str, how: signal.Signals = signal.SIGKILL) -> float:
        """Kill one process of that role; returns when."""
        os.kill(self.pid_of(role), how)
        return time.time()

    def kill_all(self) -> None:
        kill_all(self.process)

    def finish(self, seconds: float = 400.0) -> dict[str, Any]:
        """Wait for the end; returns the last status."""
        code = self.process.wait(timeout=seconds)
        assert code == 0, self.output()
        return self.status

    def output(self) -> str:
        return self.log.read_text()[-4000:]


def assert_whole(run: LiveRun, status: dict[str, Any], steps: int = STEPS) -> None:
    """Every step stands once, and every admitted group has ended as CONSUMED or DROPPED with a reason."""
    assert status["state"] == "FINISHED"
    assert [record["step"] for record in run.steps] == list(range(steps))
    groups = status["groups"]
    assert groups["CONSUMED"] == steps * GROUPS
    assert all(groups[state] == 0 for state in ("PENDING", "RUNNING", "GENERATED", "SCORED", "READY"))
    assert sum(groups["DROPPED"].values()) + groups["CONSUMED"] == status["admitted"]
    assert max(record["staleness_max"] for record in run.steps) <= 1
