"""Bulk generation with workers that only answer: which losses it survives."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.exceptions import RayTaskError

from actors import generation
from actors.cluster import Cluster
from actors.generation import DEATHS_IN_A_ROW, RolloutPool
from rporec.config import parse_config
from rporec.engine.types import EngineError, SamplingSpec
from rporec.text.completion_store import SHARD, Part, read_completions


class Answers:
    """Stands for the module `ray`: a call is its own reference, and its answer is there at once."""

    def __init__(self) -> None:
        self.killed: list[Any] = []

    def wait(self, references: list[Any], num_returns: int) -> tuple[list[Any], list[Any]]:
        return references[:1], references[1:]

    def get(self, reference: Any) -> Any:
        return reference()

    def kill(self, worker: Any) -> None:
        self.killed.append(worker)


def worker(error: Exception | None) -> Any:
    """One that raises `error` at each call, as an actor's call does."""

    def call(prompts: list[Any], specs: list[Any]) -> Any:
        def answer() -> Any:
            if error is not None:
                raise RayTaskError("generate_many", f"{type(error).__name__}: {error}", error).as_instanceof_cause()
            return [[{"text": "x", "item": None, "token_ids": [1], "finish_reason": "stop"}] for _ in prompts]

        return answer

    return SimpleNamespace(generate_many=SimpleNamespace(remote=call))


def write(monkeypatch: pytest.MonkeyPatch, folder: Path, workers: list[Any]) -> Answers:
    """Three shards by one worker; as it is lost, the next of `workers` takes its place."""
    answers, coming = Answers(), iter(workers)
    monkeypatch.setattr(generation, "ray", answers)
    monkeypatch.setattr(RolloutPool, "_start", lambda self, index: next(coming))
    part = Part(folder, np.arange(3 * SHARD), SamplingSpec())
    with RolloutPool("", parse_config({}), Cluster("", "", local=True, cuda=False), 256, 1) as pool:
        pool.write(part, lambda samples: [[1]] * len(samples), lambda *_: None)
    return answers


def test_a_worker_whose_engine_died_in_it_is_replaced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lost, good = worker(EngineError("rollout worker died: out of memory")), worker(None)
    answers = write(monkeypatch, tmp_path, [lost, good])
    assert answers.killed == [lost, good]  # the second as the pool was left
    assert read_completions(tmp_path)[0].tolist() == list(range(3 * SHARD))


def test_engines_that_die_again_and_again_end_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lost = [worker(EngineError("rollout worker died: out of memory")) for _ in range(DEATHS_IN_A_ROW)]
    with pytest.raises(EngineError, match=r"a rollout worker died: .*out of memory"):
        write(monkeypatch, tmp_path, lost)


def test_what_a_prompt_does_wrong_is_no_death(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        write(monkeypatch, tmp_path, [worker(ValueError("the prompt does not fit"))])
