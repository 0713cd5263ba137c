"""Training and serving side by side on one cluster, and what users did on its way into the next data set."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from served_run import serving
from trained_run import Watched, rporec

from rporec.data import Dataset
from rporec.files import read_json
from rporec.promotion import promote, promoted
from rporec.run import Run

pytestmark = [pytest.mark.engine, pytest.mark.cluster]


@pytest.fixture
def training(trained: Watched, tmp_path: Path):
    """Stage 2 of a copy of the small run, that would go on for long."""
    run = tmp_path / "run"
    shutil.copytree(trained.folder, run)
    stages = read_json(run / "stages.json")
    for stage in ("stage2", "evaluate"):
        stages.pop(stage, None)
    (run / "stages.json").write_text(json.dumps(stages))
    config = trained.folder.parent / "small.yaml"
    command = [
        sys.executable,
        "-m",
        "rporec.cli",
        "train",
        str(config),
        "steps=5000",
        "promotion.automatic=false",
        "--run",
        str(run),
        "--resume",
    ]
    with (tmp_path / "output.txt").open("w") as out:
        process = subprocess.Popen([*command, "--stages", "stage2"], stdout=out, stderr=subprocess.STDOUT)
    try:
        wait(lambda: read_json(run / "status.json", {}).get("state") == "RUNNING" and (run / "run.json").exists())
        yield run
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 130, (tmp_path / "output.txt").read_text()[-3000:]


def wait(until: Callable[[], bool], seconds: float = 180.0) -> None:
    deadline = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def asked(http: httpx.Client, dataset: Dataset, user: int = 0) -> dict:
    answer = http.post("/v1/recommend", json={"user_id": dataset.user_ids[user], "k": 3})
    assert answer.status_code == 200, answer.text
    assert answer.json()["fallback"] is None
    return answer.json()


def step(run: Path) -> int:
    return read_json(run / "status.json")["step"]


def test_they_share_a_cluster_and_feedback_comes_back_as_data(training: Path, tmp_path: Path) -> None:
    dataset = Dataset.load(Run.open(training).data)
    address = read_json(training / "run.json")["address"]
    with (
        serving(training, "serve.timeout_ms=60000") as service,
        httpx.Client(base_url=service.url, timeout=120) as http,
    ):
        before = step(training)
        for user in range(12):
            answer = asked(http, dataset, user)
            assert answer["version"] == promoted(Run.open(training)).version
            reaction = {"user_id": f"visitor-{user % 2}", "item_id": answer["items"][0]["item_id"], "event": "click"}
            assert http.post("/v1/feedback", json=reaction).status_code == 201
        promote(Run.open(training), "7.7", Run.open(training).best_model, None)
        wait(lambda: asked(http, dataset)["version"] == "7.7", 30)
        wait(lambda: step(training) > before)
        assert read_json(training / "run.json")["address"] == address
    after = step(training)
    wait(lambda: step(training) > after)  # the end of the service is not the end of the training
    result = rporec(
        "data",
        "build",
        "--interactions",
        str(training / "source" / "interactions.parquet"),
        str(training / "feedback"),
        "--items",
        str(training / "source" / "items.parquet"),
        "--out",
        str(tmp_path / "next"),
    )
    assert result.returncode == 0, result.stderr
    built = Dataset.load(tmp_path / "next")
    assert {"visitor-0", "visitor-1"} <= set(built.user_ids)
    assert len(built.items) == len(dataset.items) + 12
