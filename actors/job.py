"""What every stage is given: the run, its config, the cluster, and how to start a learner group on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from actors.cluster import Cluster, cores, cores_beside
from actors.learner_group import fit
from rporec.config import Config
from rporec.engine.transfer import engine_gpus
from rporec.models.trainable import learner_environment
from rporec.recipes import StagedRecipe, load_recipe
from rporec.run import Run


@dataclass(frozen=True)
class Job:
    """What every stage is given."""

    run: Run
    config: Config
    cluster: Cluster
    console: Console

    def load_recipe(self) -> StagedRecipe:
        """Its data set, and its tokenizer once the backbone is made, are read anew."""
        return load_recipe(self.run, self.config)

    def placements(self) -> dict[str, int]:
        """How many places of each role the run takes at once."""
        config = self.config
        rollouts, rewards = config.rollout_workers.min, config.reward_workers.min
        return {"rollout": rollouts, "reward": rewards, "learner": config.learners}

    def gpus(self) -> float:
        """How many GPUs stage 2 holds at once; of preferences its learners alone."""
        if not self.cluster.cuda:
            return 0
        config, places = self.config, self.placements()
        learners = places["learner"] * config.deepspeed.gpu_share
        if config.recipe == "preference":
            return learners
        rollouts = places["rollout"] * engine_gpus(config.engine)
        return learners + rollouts + places["reward"] * config.reward.gpu_share

    def learner_env(self, ranks: int, *, alone: bool) -> dict[str, str]:
        """`alone`: no rollout workers generate meanwhile, so the ranks may have all cores."""
        return learner_environment(self.cluster.cuda, threads=self._threads(ranks, alone))

    def learner_cores(self) -> list[int] | None:
        """For the ranks of stage 2: where no rollout worker is pinned; None where there are too few such, or GPUs.

        A rollout worker cannot move away from a learner that the system puts on its core.
        """
        if self.cluster.cuda or not self.cluster.local:
            return None
        ranks, free = self.config.learners, cores_beside(self.config.rollout_workers.max)
        return free if len(free) >= ranks * self._threads(ranks, alone=False) else None

    def _threads(self, ranks: int, alone: bool) -> int:
        sharing = ranks if alone else ranks + self.config.rollout_workers.min
        return max(1, cores() // sharing)

    def generators(self) -> int:
        """Workers for bulk generation, when no learner wants the cores: one each, up to the machine's."""
        if self.cluster.cuda or not self.cluster.local:
            return self.config.rollout_workers.min
        return max(self.config.rollout_workers.min, min(cores(), 4))

    def fit(
        self,
        loop: Callable[[dict[str, Any]], None],
        spec: dict[str, Any],
        name: str,
        workers: int,
        watch: Callable[[], None],
        *,
        alone: bool = True,
        **more: Any,
    ) -> None:
        """`actors.learner_group.fit` on this run's cluster; `alone` as in `learner_env`."""
        env = self.learner_env(workers, alone=alone)
        more["gpu_share"] = self.config.deepspeed.gpu_share
        fit(loop, spec, name=name, run=self.run, cluster=self.cluster, workers=workers, watch=watch, env=env, **more)
