"""How the controller comes by its workers. `actors.simulated` has the same without Ray."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Protocol

import ray
from ray.exceptions import ActorDiedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.cluster import Cluster
from actors.reward import RewardWorker, reward_options
from actors.rollout import RolloutWorker, rollout_options
from actors.weight_store import WeightStore
from rporec.config import Config
from rporec.recipes import Recipe
from rporec.run import Run


class Placement(Protocol):
    """Handles that it returns are called as Ray actors are: `handle.method.remote(…)`."""

    def rollout(self, run: Run, config: Config, recipe: Recipe, name: str, place: int) -> Any: ...

    def reward(self, run: Run, config: Config, name: str) -> Any: ...

    def store(self) -> Any: ...

    def put(self, value: Any) -> Any:
        """A reference that keeps `value` while it is held."""

    def kill(self, actor: Any) -> None: ...

    def here(self) -> str:
        """The node that this process is on."""

    def is_store(self, store: Any, error: ActorDiedError) -> bool:
        """Whether `error` tells of the store's death."""

    def restart(self) -> None:
        """End the controller's process, to be started anew."""

    def restarted(self) -> bool:
        """Whether the controller was started anew because its process ended."""


@dataclass(frozen=True)
class RayPlacement:
    """Actors on a Ray cluster, each where its role's resource is."""

    cluster: Cluster

    def rollout(self, run: Run, config: Config, recipe: Recipe, name: str, place: int) -> Any:
        options = rollout_options(config.engine, self.cluster.cuda)
        return RolloutWorker.options(name=_ray_name(name), **options).remote(
            name=name,
            model=str(recipe.model),
            engine=config.engine,
            context=recipe.context,
            seed=config.seed + place,
            cpu_core=self.cluster.core(place),
        )

    def reward(self, run: Run, config: Config, name: str) -> Any:
        options = reward_options(self.cluster, config.reward.gpu_share)
        return RewardWorker.options(name=_ray_name(name), **options).remote(run, config)

    def store(self) -> Any:
        here = NodeAffinitySchedulingStrategy(self.here(), soft=False)  # neither is of use without the other
        return WeightStore.options(num_cpus=0, scheduling_strategy=here).remote()

    def put(self, value: Any) -> Any:
        return ray.put(value)

    def kill(self, actor: Any) -> None:
        ray.kill(actor)

    def here(self) -> str:
        return ray.get_runtime_context().get_node_id()

    def is_store(self, store: Any, error: ActorDiedError) -> bool:
        return error.actor_id == store._actor_id.hex()

    def restart(self) -> None:
        os._exit(1)

    def restarted(self) -> bool:
        return ray.get_runtime_context().was_current_actor_reconstructed


def _ray_name(name: str) -> str:
    """Unlike those that a dead controller's workers may still hold in Ray."""
    return f"{name}-of-{os.getpid()}"
