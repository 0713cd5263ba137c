"""The reward worker: a `Judge` behind a Ray actor. It scores whole batches, never one completion."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from actors.cluster import Cluster, role_options
from rporec.config import Config
from rporec.recipes import load_recipe
from rporec.run import Run


def reward_options(cluster: Cluster, share: float) -> dict[str, Any]:
    """`share`: of a GPU, where the cluster has any. The frozen models of the reward run there, or on the CPU."""
    env = {} if cluster.cuda else {"OMP_NUM_THREADS": "1"}
    return role_options("reward", cluster, gpus=share, env=env)


@ray.remote
class RewardWorker:
    def __init__(self, run: Run, config: Config) -> None:
        run.require_here()
        self.judge = load_recipe(run, config).judge()
        self.judge.load()

    def score(self, *batches: pa.RecordBatch) -> tuple[Any, ...]:
        """The scored batches, one return value each, and last what the controller is told of them."""
        scored, metas = self.judge.score(list(batches))
        return (*scored, metas)

    def validate(self, samples: np.ndarray, written: list[list[dict[str, Any]]]) -> dict[str, float]:
        """Metrics of what was written for each sample."""
        return self.judge.validate(samples, written)

    def status(self) -> dict[str, Any]:
        node = ray.get_runtime_context().get_node_id()
        return {"pid": os.getpid(), "node": node, "cpu_seconds": time.process_time()}
