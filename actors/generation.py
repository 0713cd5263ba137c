"""Bulk generation: many prompts through N rollout workers, into shards that a restart keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError

from actors.cluster import Cluster, last_words
from actors.rollout import RolloutWorker, rollout_options
from actors.workers import is_death
from rporec.config import Config
from rporec.engine.types import EngineError
from rporec.text.completion_store import Part

# Called with (prompts finished, prompts in all, completion tokens so far).
Progress = Callable[[int, int, int], None]


DEATHS_IN_A_ROW = 3  # of each worker, with no shard between them


class RolloutPool:
    """N rollout workers that hold one model, each replaced when it or its engine is lost; leaves none behind on exit."""

    def __init__(self, model: Path | str, config: Config, cluster: Cluster, context: int, workers: int) -> None:
        self._model, self._config, self._cluster, self._context = str(model), config, cluster, context
        self.workers = [self._start(index) for index in range(workers)]

    def _start(self, index: int) -> Any:
        return RolloutWorker.options(**rollout_options(self._config.engine, self._cluster.cuda)).remote(
            name=f"generator-{index}",
            model=self._model,
            engine=self._config.engine,
            context=self._context,
            seed=self._config.seed + index,
            cpu_core=self._cluster.core(index),
        )

    def __enter__(self) -> RolloutPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self.workers:
            ray.kill(worker)

    def write(self, part: Part, prompts: Callable[[np.ndarray], Sequence[Any]], progress: Progress) -> None:
        """Write the shards of `part` that are missing; `prompts` gives token ids for sample numbers.

        Raises EngineError when a worker does not start, or many are lost in a row.
        """
        missing = part.missing()
        finished, tokens = len(part.samples) - sum(len(part.shard(number)) for number in missing), 0
        progress(finished, len(part.samples), tokens)
        running: dict[Any, tuple[int, int, Any]] = {}  # shard, index of its worker, the worker
        # Two shards a worker: the next one's prompts join the batch while the last one's tail runs out.
        idle = [index for index in range(len(self.workers)) for _ in range(2)]
        missing.reverse()
        deaths = 0
        while missing or running:
            while missing and idle:
                number, index = missing.pop(), idle.pop()
                worker = self.workers[index]
                asked = worker.generate_many.remote(list(prompts(part.shard(number))), part.specs(number))
                running[asked] = (number, index, worker)
            (done, *_), _ = ray.wait(list(running), num_returns=1)
            number, index, worker = running.pop(done)
            idle.append(index)
            try:
                rows = ray.get(done)
            except RayError as error:
                if not is_death(error):
                    raise
                missing.append(number)
                if worker is self.workers[index]:  # else its other shard has told already
                    deaths += 1
                    if getattr(error, "actor_init_failed", False) or deaths == DEATHS_IN_A_ROW * len(self.workers):
                        raise EngineError(f"a rollout worker died: {last_words(error)}") from None
                    ray.kill(worker)  # out of reach or without engine is not dead, and holds its place
                    self.workers[index] = self._start(index)
                continue
            deaths = 0
            tokens += part.write(number, rows)
            finished += len(part.shard(number))
            progress(finished, len(part.samples), tokens)
