"""`rporec train --address`: a job on the cluster that goes on without the command that submitted it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import yaml

from rporec.run import Run

pytestmark = pytest.mark.cluster

CONFIG = {
    "name": "sent",
    "data": {
        "window": 8,
        "synthetic": {"users": 60, "series": 6, "volumes": 4, "genres": 4, "studios": 6, "length": 10},
    },
    "tiny": {
        "hidden": 64,
        "heads": 2,
        "kv_heads": 1,
        "layers": 1,
        "intermediate": 128,
        "vocabulary": 512,
        "context": 192,
    },
    "warmup": {"steps": 1_000_000},  # until it is stopped
    "reward": {"custom": "mine:score"},
}
# Read in the job alone, so it also sees whether the job runs what was sent.
OWN_REWARD = """
import rporec, actors
assert "runtime_resources" in rporec.__file__ and "runtime_resources" in actors.__file__

def score(completions, targets, rank):
    return rank * 0
"""


@pytest.fixture(scope="module")
def cluster():
    from ray.cluster_utils import Cluster

    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        port, agent_port = one.getsockname()[1], other.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{sys.prefix}/bin:{os.environ['PATH']}")  # the nodes' `python` is the one with Ray
        cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 2,
                "include_dashboard": True,  # it takes jobs
                "dashboard_port": port,
                "dashboard_agent_listen_port": agent_port,
                "resources": {"learner": 1, "rollout": 1, "reward": 1},
                "object_store_memory": 200 * 2**20,
            },
        )
    yield cluster
    cluster.shutdown()


@pytest.fixture
def submit(cluster, tmp_path):
    """Start `rporec train` in a folder that the job does not have, with an own reward beside the config."""
    here = tmp_path / "here"
    here.mkdir()
    (here / "sent.yaml").write_text(yaml.safe_dump(CONFIG))
    (here / "mine.py").write_text(OWN_REWARD)
    command = [sys.executable, "-m", "rporec.cli", "train", "sent.yaml", "--address", cluster.address]

    def start(*words):
        return subprocess.Popen(
            [*command, *map(str, words)], cwd=here, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests in the background ignore it
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(here), *filter(None, sys.path)])},
        )  # fmt: skip

    return start


def test_code_and_config_travel_and_the_job_s_words_and_status_come_back(submit, tmp_path) -> None:
    folder = tmp_path / "shared" / "run"
    sent = submit("--run", folder, "--stages", "data", "seed=3")
    said, _ = sent.communicate(timeout=120)
    assert sent.returncode == 0, said
    assert "data: write: 4/4" in said
    assert Run.open(folder).finished("data")
    assert Run.open(folder).config().seed == 3
    again = submit("--run", folder, "--stages", "data")
    said, _ = again.communicate(timeout=120)
    assert again.returncode == 2
    assert f"{folder}: holds a run already" in said


def test_ctrl_c_leaves_the_job_alone_and_says_how_to_find_it(submit, cluster, tmp_path) -> None:
    from ray.job_submission import JobSubmissionClient

    folder = tmp_path / "shared" / "run"
    sent = submit("--run", folder)
    deadline = time.monotonic() + 120
    while not (folder / "config.json").exists():
        assert time.monotonic() < deadline and sent.poll() is None, sent.communicate()[0]  # noqa: PT018
        time.sleep(0.2)
    sent.send_signal(signal.SIGINT)
    said, _ = sent.communicate(timeout=20)
    assert sent.returncode == 0, said
    client = JobSubmissionClient(cluster.address)
    (job,) = [one for one in client.list_jobs() if one.metadata and one.metadata.get("run") == str(folder)]
    assert job.status == "RUNNING"
    for hint in ("ray job logs --follow", "rporec status", "rporec scale", "ray job stop"):
        assert any(hint in line and (job.submission_id in line or str(folder) in line) for line in said.splitlines())
    second = submit("--run", folder, "--resume")
    said, _ = second.communicate(timeout=60)
    assert second.returncode == 2
    assert f"job {job.submission_id} trains it already" in said
    client.stop_job(job.submission_id)
    while client.get_job_status(job.submission_id) != "STOPPED":
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_run_folder_that_only_this_machine_may_know_is_refused(submit) -> None:
    sent = submit("--run", "runs/x")
    said, _ = sent.communicate(timeout=60)
    assert sent.returncode == 2
    assert "--run: on a cluster an absolute path" in said
