"""A run that stands before stage 2, and stage 2 started on copies of it."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from live_run import CONFIG, LiveRun, rporec

from rporec.files import read_json


@pytest.fixture(scope="session")
def before_stage2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chaos")
    (folder / "chaos.yaml").write_text(CONFIG)
    command = rporec("train", str(folder / "chaos.yaml"), "--run", str(folder / "run"))
    done = subprocess.run([*command, "--stages", "data,warmup,stage1"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


@pytest.fixture(scope="session")
def start_stage2(before_stage2: Path):
    """`with start_stage2(folder) as start`: runs that `start` begins in that folder, and none is left behind."""

    @contextlib.contextmanager
    def starting(within: Path):
        running: list[LiveRun] = []

        def start(*overrides: str, folder: Path | None = None, **changes: Any) -> LiveRun:
            run = folder or within / "run"
            if not run.exists():
                shutil.copytree(before_stage2 / "run", run, ignore=shutil.ignore_patterns("ray"))
            if changes:  # what a resumed run may not change on the command line
                config = read_json(run / "config.json")
                for key, value in changes.items():
                    section, _, name = key.rpartition("__")
                    (config[section] if section else config)[name] = value
                (run / "config.json").write_text(json.dumps(config))
            log = within / f"output-{len(running)}.txt"
            command = rporec("train", str(run / "config.json"), *overrides, "--run", str(run), "--resume")
            with log.open("w") as out:
                process = subprocess.Popen([*command, "--stages", "stage2"], stdout=out, stderr=subprocess.STDOUT)
            running.append(LiveRun(run, process, log))
            return running[-1]

        try:
            yield start
        finally:
            for one in running:
                if one.process.poll() is None:
                    one.process.terminate()
                    one.process.wait(60)

    return starting


@pytest.fixture
def stage2(start_stage2, tmp_path: Path):
    """Starts stage 2 on a copy of the run."""
    with start_stage2(tmp_path) as start:
        yield start
