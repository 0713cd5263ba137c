"""One small training through the command line, for all tests that look at a finished run or build on a copy of it."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from rporec.files import read_json, read_lines

# Warmed up until most completions are well formed, else all rewards are 0 and the weights never move.
SMALL = """
data: {window: 8, synthetic: {users: 240, series: 24, volumes: 4, genres: 4, studios: 6, length: 10}}
tiny: {hidden: 64, heads: 2, kv_heads: 1, layers: 1, intermediate: 128, vocabulary: 512, context: 192}
teacher: {decision: true}
warmup: {steps: 240, batch_size: 16, lr: 6e-3}
sampling: {max_tokens: 40}"""
CONFIG = f"""
{SMALL}
name: small
head: {{epochs: 3, lr: 2e-3, dim: 32, refreshed: true}}
max_staleness: 1
groups_per_step: 8
steps: 6
checkpoint_every: 3
max_eval_samples: 60
eval_samples: 2
save_rollouts: true
weight_transfer: nccl
rl: {{validate_every: 3, validate_samples: 32}}
"""


class Watched:
    """A finished run, and what its status said while it was going on."""

    def __init__(self, folder: Path, output: str, seen: list[dict]) -> None:
        self.folder, self.output, self.seen = folder, output, seen


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    work = tmp_path_factory.mktemp("training")
    config, run = work / "small.yaml", work / "run"
    config.write_text(CONFIG)
    seen: list[dict] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.3):
            if status := read_json(run / "status.json"):
                seen.append(status)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = rporec("train", str(config), "--run", str(run))
    finally:
        over.set()
        watcher.join()
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return Watched(run, result.stdout, seen)


def rporec(*words: str) -> subprocess.CompletedProcess[str]:
    """The command, to its end."""
    return subprocess.run([sys.executable, "-m", "rporec.cli", *words], capture_output=True, text=True, timeout=600)


@dataclass(frozen=True)
class Killed:
    """What was there when a command had ended that was killed, all of it or its learner."""

    records: list[dict[str, Any]]  # of the log that it was watched by
    status: int
    output: str


def killed(log: Path, lines: int, *words: str, learner: bool = False) -> Killed:
    """The command, killed with all its processes once `log` has so many lines; or only its learner, and it goes on."""
    with tempfile.TemporaryFile("w+") as output:
        command = [sys.executable, "-m", "rporec.cli", *words]
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 600
        while len(read_lines(log)) < lines and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        if learner and process.poll() is None:
            ranks = [one for one in psutil.Process(process.pid).children(recursive=True) if is_learner(one)]
            for rank in ranks:
                rank.kill()
            process.wait(120)
        else:
            kill_all(process)
        output.seek(0)
        found = Killed(read_lines(log), process.returncode, output.read())
    assert len(found.records) >= lines, found.output[-3000:]
    return found


def is_learner(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return "RayTrainWorker" in "".join(process.cmdline())
    return False


def kill_all(process: subprocess.Popen) -> None:
    """A command and every process that it started, at once."""
    with contextlib.suppress(psutil.NoSuchProcess):
        command = psutil.Process(process.pid)
        for one in [*command.children(recursive=True), command]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    process.wait(30)
