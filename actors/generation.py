"""Bulk generation: many prompts through N rollout workers, into shards that a restart keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayActorError

from actors.cluster import Cluster, last_words
from actors.rollout import RolloutWorker, rollout_options
from rporec.config import Config
from rporec.engine.types import EngineError
from rporec.text.completion_store import Part

# Called with (prompts finished, prompts in all, completion tokens so far).
Progress = Callable[[int, int, int], None]


class RolloutPool:
    """N rollout workers that hold one model; leaves none behind on exit."""

    def __init__(self, model: Path | str, config: Config, cluster: Cluster, context: int, workers: int) -> None:
        options = rollout_options(config.engine, cluster.cuda)
        self.workers = [
            RolloutWorker.options(**options).remote(
                name=f"generator-{index}",
                model=str(model),
                engine=config.engine,
                context=context,
                seed=config.seed + index,
                cpu_core=cluster.core(index),
            )
            for index in range(workers)
        ]

    def __enter__(self) -> RolloutPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self.workers:
            ray.kill(worker)

    def write(self, part: Part, prompts: Callable[[np.ndarray], Sequence[Any]], progress: Progress) -> None:
        """Write the shards of `part` that are missing; `prompts` gives token ids for sample numbers."""
        missing = part.missing()
        finished, tokens = len(part.samples) - sum(len(part.shard(number)) for number in missing), 0
        progress(finished, len(part.samples), tokens)
        running: dict[Any, tuple[int, Any]] = {}
        # Two shards a worker: the next one's prompts join the batch while the last one's tail runs out.
        idle = [worker for worker in self.workers for _ in range(2)]
        missing.reverse()
        while missing or running:
            while missing and idle:
                number, worker = missing.pop(), idle.pop()
                asked = worker.generate_many.remote(list(prompts(part.shard(number))), part.specs(number))
                running[asked] = (number, worker)
            (done, *_), _ = ray.wait(list(running), num_returns=1)
            number, worker = running.pop(done)
            idle.append(worker)
            try:
                rows = ray.get(done)
            except RayActorError as error:
                raise EngineError(f"a rollout worker died: {last_words(error)}") from None
            tokens += part.write(number, rows)
            finished += len(part.shard(number))
            progress(finished, len(part.samples), tokens)
