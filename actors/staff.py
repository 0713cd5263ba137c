"""The staff: rollout and reward workers as they join, die, are replaced, and come and go with the work."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Mapping
from statistics import fmean
from typing import Any

from actors.cluster import last_words
from actors.training import Training
from actors.workers import Worker, Workers
from rporec.engine.types import EngineError
from rporec.rl.elastic import Autoscaler

# Workers of one role that die in a row, with no result between: what they are given kills them.
LOST_IN_A_ROW = 8
# Seconds before each try to replace a dead worker; the last one again and again.
REPLACEMENT_PAUSES = (0.0, 2.0, 10.0)
START_POLL = 0.1  # seconds


class Staff:
    """The workers of both roles. `settle` gives a new rollout worker the weights that it is to begin with."""

    def __init__(self, training: Training, settle: Callable[[Worker], Awaitable[None]]) -> None:
        self.training, self._settle = training, settle
        config, kill = training.config, training.placement.kill
        self.rollouts = Workers("rollout", config.rollout_workers.min, config.slots, self._start_rollout, kill)
        self.rewards = Workers("reward", config.reward_workers.min, 1, self._start_reward, kill)
        self.idle_rewards: asyncio.Queue[Worker] = asyncio.Queue()
        self._loads: list[dict[str, float]] = []  # of each role, at the heartbeats of this learner step
        elastic = {"rollout": config.rollout_workers, "reward": config.reward_workers}
        bounds = {role: (asked.min, asked.max) for role, asked in elastic.items() if asked.min < asked.max}
        self._scaler = Autoscaler(bounds)

    def of(self, role: str) -> Workers:
        return {"rollout": self.rollouts, "reward": self.rewards}[role]

    async def start(self) -> None:
        """Bring up as many as are wanted; returns when every one of them is ready."""
        roles = (self.rollouts, self.rewards)
        await asyncio.gather(*(self._add(role, place) for role in roles for place in role.vacant))
        while any(worker.state == "STARTING" for role in roles for worker in role.left):  # whom `scale` has added
            await asyncio.sleep(START_POLL)

    async def idle_reward(self) -> Worker:
        """The next one with nothing to do. Whoever takes it gives it back to `free`, dead or alive."""
        while (worker := await self.idle_rewards.get()).state != "ALIVE":
            pass
        return worker

    def lost(self, worker: Worker, error: BaseException) -> None:
        """A worker died: its groups go back to PENDING, another takes its place, and the run goes on."""
        if worker.state not in ("ALIVE", "LEAVING"):
            return
        workers, training = self.rollouts if worker.name.startswith(self.rollouts.role) else self.rewards, self.training
        workers.bury(worker)
        training.journal.died(workers.role, worker.name, worker.pid, worker.node, last_words(error))
        training.ledger.worker_lost(worker.name)
        training.in_a_row[workers.role] += 1
        if training.in_a_row[workers.role] >= LOST_IN_A_ROW * workers.wanted:
            raise RuntimeError(
                f"{training.in_a_row[workers.role]} {workers.role} workers in a row died: {last_words(error)}"
            )
        if worker.place < workers.wanted:
            training.spawn(self._replace(workers, worker.place))
        training.spawn(training.forget_lost())  # it may have gone with its whole node
        training.room.set()

    def free(self, worker: Worker) -> None:
        """A reward worker that `idle_reward` gave has nothing to do again."""
        worker.running = 0
        self.idle_rewards.put_nowait(worker)

    def scale(self, role: str, count: int) -> list[dict[str, Any]]:
        """Have `count` workers of a role from now on; those that leave finish what they hold. Returns who there is."""
        workers = self.of(role)
        workers.wanted = count
        for place in workers.vacant:
            self.training.spawn(self._replace(workers, place))
        for worker in workers.left:
            if worker.place >= count and worker.state == "STARTING":
                workers.bury(worker)
            elif worker.place >= count:
                self.training.spawn(workers.retire(worker))
        return workers.describe()

    def observe(self, queues: Mapping[str, float]) -> None:
        """Note each role's load now; `queues`: what waits for it, in slots that it would fill."""
        self._loads.append({role: self.of(role).load(queued) for role, queued in queues.items()})

    def mean_loads(self) -> dict[str, float]:
        """Of each role since the last learner step; {} when none was noted between."""
        loads = {role: fmean(load[role] for load in self._loads) for role in (self._loads or [{}])[0]}
        self._loads.clear()
        return loads

    def autoscale(self, seconds: Mapping[str, float], loads: Mapping[str, float]) -> None:
        """Workers come and go with what waited in the learner step that took `seconds`, and with their loads in it."""
        if not loads:
            return
        self._scaler.observe(seconds["wait"] / max(seconds["total"], 1e-9), loads)
        for role, count in self._scaler.wanted({role: self.of(role).wanted for role in loads}).items():
            if count != self.of(role).wanted:
                self.scale(role, count)

    def describe(self) -> list[dict[str, Any]]:
        return [*self.rollouts.describe(), *self.rewards.describe()]

    @property
    def cpu_seconds(self) -> float:
        return self.rollouts.cpu_seconds + self.rewards.cpu_seconds

    async def measure(self) -> None:
        await asyncio.gather(self.rollouts.measure(), self.rewards.measure())

    def stop(self) -> None:
        self.rollouts.stop()
        self.rewards.stop()

    def _start_rollout(self, name: str, place: int) -> Any:
        one = self.training
        return one.placement.rollout(one.run, one.config, one.recipe, name, place)

    def _start_reward(self, name: str, place: int) -> Any:
        return self.training.placement.reward(self.training.run, self.training.config, name)

    async def _add(self, workers: Workers, place: int) -> None:
        """Someone in this place, unless somebody is there by now, or nobody is wanted when the start is over."""
        if place not in workers.vacant or (worker := await workers.add(place)) is None:
            return
        if workers is self.rewards:
            self.idle_rewards.put_nowait(worker)
        else:
            await self._settle(worker)
            self.training.room.set()

    async def _replace(self, workers: Workers, place: int) -> None:
        """A new worker in the place of a dead one, tried for ever while others live; else the run ends."""
        for tries in itertools.count(1):
            await asyncio.sleep(REPLACEMENT_PAUSES[min(tries, len(REPLACEMENT_PAUSES)) - 1])
            if place not in workers.vacant:
                return  # scaled down meanwhile, or down and up again
            try:
                return await self._add(workers, place)
            except EngineError as error:
                name = f"{workers.role} in place {place}"
                self.training.journal.died(workers.role, name, 0, "", last_words(error))
                if tries >= len(REPLACEMENT_PAUSES) and not workers.left:
                    raise
