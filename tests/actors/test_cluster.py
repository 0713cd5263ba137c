"""What a cluster that is started here has, and what is told of a death."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import ray

from actors.cluster import connected, probable_cause
from rporec.config import parse_config


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
