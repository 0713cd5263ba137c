"""What a cluster that is started here has, and what is told of a death."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import pytest
import ray
from rich.console import Console

from actors.cluster import Cluster, connected, probable_cause
from actors.job import Job
from actors.launch import _check_gpus
from actors.reward import reward_options
from actors.rollout import rollout_options
from rporec.config import ConfigError, EngineConfig, parse_config
from rporec.run import Run


class Started(Exception):
    """Of Ray, which is started no further."""


@pytest.mark.parametrize(
    ("device", "gpus", "size"),
    [("auto", False, 512 * 2**20), ("auto", True, None), ("cuda", True, None), ("cpu", True, 512 * 2**20)],
)
def test_the_object_store_is_a_laptops_unless_there_are_gpus(
    monkeypatch: pytest.MonkeyPatch, device: str, gpus: bool, size: int | None
) -> None:
    options: dict[str, Any] = {}

    def init(**given: Any) -> None:
        options.update(given)
        raise Started

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/nvidia-smi" if gpus else None)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    with pytest.raises(Started), connected(parse_config({"device": device}), None, "test"):
        pass
    assert options.get("object_store_memory") == size


def cluster(cuda: bool) -> Cluster:
    return Cluster(address="", namespace="test", local=True, cuda=cuda)


def test_a_reward_worker_has_the_share_of_a_gpu_that_the_config_gives_it() -> None:
    assert reward_options(cluster(True), 0.25)["num_gpus"] == 0.25
    assert reward_options(cluster(True), 0.0)["num_gpus"] == 0
    assert reward_options(cluster(False), 0.25)["num_gpus"] == 0


@pytest.mark.parametrize(
    "options",
    [
        reward_options(cluster(True), 0.0),
        reward_options(cluster(True), 0.25),
        reward_options(cluster(False), 0.25),
        rollout_options(EngineConfig(), True),
        rollout_options(EngineConfig(), False),
    ],
)
def test_who_asks_for_no_gpu_sees_none(options: dict[str, Any]) -> None:
    hidden = options["runtime_env"]["env_vars"].get("CUDA_VISIBLE_DEVICES")
    assert hidden == (None if options["num_gpus"] else "")


@pytest.mark.parametrize(
    ("config", "gpus"),
    [
        ({}, 2),
        ({"learners": 2, "groups_per_step": 8, "rollout_workers": {"min": 3, "max": 4}}, 5),
        ({"engine": {"gpu_share": 0.5}, "deepspeed": {"gpu_share": 0.4}, "reward": {"gpu_share": 0.1}}, 1),
        ({"engine": {"args": {"tensor_parallel_size": 2}}}, 3),
        ({"recipe": "preference"}, 1),
    ],
)
def test_a_machine_with_too_few_gpus_is_refused_before_the_first_stage(
    monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], gpus: int
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"rollout": 9, "reward": 9, "learner": 9, "GPU": there})
    console = Console(file=io.StringIO(), width=200)
    here, joined = (
        Job(Run(Path()), parse_config(config), Cluster("", "", one, True), console) for one in (True, False)
    )
    for there in (gpus, gpus - 1):
        if there == gpus:
            _check_gpus(here)
        else:
            with pytest.raises(ConfigError, match=rf"stage 2 holds {gpus} GPUs at once, and this machine has {there};"):
                _check_gpus(here)
        _check_gpus(joined)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [line.partition(";")[0] for line in lines] == [f"waits for nodes: GPU ({gpus - 1} of {gpus})"]
    _check_gpus(Job(Run(Path()), parse_config(config), cluster(False), console))


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        ("Worker exit type: SYSTEM_ERROR … connection error code 2. End of file.", "killed from outside"),
        ("The actor died because its node has died. Node Id: 12ab", "its node is gone"),
        ("no answer within 5 s (reward.timeout)", "it hangs"),
        ("rollout worker died: OutOfMemoryError; probable cause: no memory left; lower …", ""),
        ("ValueError: no such thing", "a fault in its code"),
    ],
)
def test_last_words_tell_the_cause(words: str, cause: str) -> None:
    assert probable_cause(words).startswith(cause)
    assert bool(probable_cause(words)) == bool(cause)
