"""What a training would do, without its machines: the real controller and ledger, workers that only take time."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from actors.controller import Controller
from actors.simulated import (
    Consumed,
    Latency,
    SimulatedPlacement,
    SimulatedRecipe,
    SimulatedRollout,
    learn,
    on_virtual_clock,
)
from rporec.config import Config, override
from rporec.plan import Speeds
from rporec.run import Run

LONG_TAIL = 0.8  # sigma of a log-normal: one generation in a hundred takes five times the mean
MEASURED_TAIL = 0.4  # that of benchmarks/generation_seconds.json
STEPS = 25


class Measured:
    """One training in simulated or real time, and what its learner saw."""

    def __init__(
        self, config: Config, rollout: Latency, learner: Latency, kind: type[SimulatedRollout] = SimulatedRollout
    ) -> None:
        self.config, self.learner = config, learner
        self.placement = SimulatedPlacement(rollout, rollout_kind=kind)
        self.seen: list[Consumed] = []
        self.seconds = 0.0

    async def run(self, meanwhile: Callable[[Measured], Any] | None = None) -> Measured:
        with tempfile.TemporaryDirectory() as folder:
            controller = Controller(Run(Path(folder)), self.config, self.placement, SimulatedRecipe())
            await controller.start()
            loop = asyncio.get_running_loop()
            began = loop.time()
            beside = asyncio.create_task(meanwhile(self)) if meanwhile else None
            await learn(controller, self.learner, np.random.default_rng(0), seen=self._note)
            self.seconds = loop.time() - began
            if beside is not None:
                beside.cancel()
            self.busy = [one.busy for one in self.placement.alive.values() if isinstance(one, SimulatedRollout)]
            self.queued = controller.ledger.counts()["PENDING"] + len(controller.scoring.written)
            await controller.stop()
        return self

    def _note(self, consumed: Consumed) -> None:
        self.seen.append(consumed)

    @property
    def groups_per_second(self) -> float:
        """From the end of the first step on: filling the pipe is no steady state."""
        rest = self.seen[1:]
        return len(rest) * self.config.groups_per_step / sum(one.waited + one.trained for one in rest)

    @property
    def learner_idle(self) -> float:
        rest = self.seen[1:]
        return sum(one.waited for one in rest) / sum(one.waited + one.trained for one in rest)

    def rollout_idle(self, slots: int) -> float:
        """slots: groups that a worker holds at once."""
        return 1 - sum(self.busy) / (self.seconds * slots * self.config.rollout_workers.min)

    @property
    def staleness(self) -> float:
        return sum(one.version - one.oldest for one in self.seen) / len(self.seen)


class SharingRollout(SimulatedRollout):
    """An engine that writes as much at any load: what runs at once shares it, and each gets on the slower.

    Real engines lie between this and its parent, the nearer to this one the more they compute than wait for memory.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._running: list[tuple[float, int, asyncio.Future, Callable[[], Any]]] = []  # by `_given` at their end
        self._given = 0.0  # seconds of the engine that each of those that ran all the time has had
        self._since = 0.0
        self._count = itertools.count()
        self._next: asyncio.TimerHandle | None = None

    def write(self, seconds: float, value: Callable[[], Any]) -> asyncio.Future:
        self._advance()
        future = asyncio.get_running_loop().create_future()
        heapq.heappush(self._running, (self._given + seconds, next(self._count), future, value))
        self._plan()
        return future

    def _advance(self) -> None:
        now = asyncio.get_running_loop().time()
        self._given += (now - self._since) / max(1, len(self._running))
        self._since = now

    def _plan(self) -> None:
        if self._next is not None:
            self._next.cancel()
        left = max(0.0, self._running[0][0] - self._given) * len(self._running) if self._running else None
        self._next = None if left is None else asyncio.get_running_loop().call_later(left, self._finish)

    def _finish(self) -> None:
        self._advance()
        _, _, future, value = heapq.heappop(self._running)
        if not future.done():
            future.set_result(value())
        self._plan()


def balance(config: Config, speeds: Speeds, workers: int) -> dict[str, float]:
    """`{workers, step_seconds, learner_waits, rollout_waits}` with so many rollout workers; waits are shares of time.

    A group takes a log-normal time of its worker, in the mean what `speeds` says. Rewards and the transfer of weights
    take none.
    """
    planned = override(
        config,
        [
            f"rollout_workers={workers}",
            "learners=1",  # `speeds` is of all ranks together
            f"steps={STEPS}",
            f"checkpoint_every={STEPS}",
            "rl.validate_every=1000000",
            "promotion.automatic=false",  # there are no weights
            "save_rollouts=false",
        ],
    )
    rollout, learner = Latency(speeds.rollout, MEASURED_TAIL), Latency(speeds.learner * config.groups_per_step)
    measured = on_virtual_clock(Measured(planned, rollout, learner, SharingRollout).run())
    return {
        "workers": workers,
        "step_seconds": round(config.groups_per_step / measured.groups_per_second, 4),
        "learner_waits": round(measured.learner_idle, 4),
        "rollout_waits": round(max(0.0, measured.rollout_idle(1)), 4),
    }
