"""The learner's steps: which groups each of them gets, and whether another is to follow."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import Any

from actors.training import Training, signal
from rporec.engine.types import Version
from rporec.rl.ledger import Group
from rporec.rl.rollout_schema import GroupMeta


@dataclass(frozen=True)
class Batch:
    """One learner step's groups, in the order in which they are consumed."""

    step: int
    version: Version
    payloads: tuple[Any, ...]  # references to record batches


class Steps:
    """READY groups become CONSUMED. Every rank asks for the batch of a step and gets the same one."""

    def __init__(self, training: Training) -> None:
        self.training, self.config, self.ledger = training, training.config, training.ledger
        self.next = self.ledger.step  # the learner's next one
        self.interrupted = False
        self.stepped_on = asyncio.Event()  # the learner has finished a step, or was rolled back
        self.metas: deque[GroupMeta] = deque(maxlen=self.config.groups_per_step)  # of the newest learner step
        self._batches: dict[int, asyncio.Future[Batch | None]] = {}

    def left(self) -> bool:
        """Whether another step is to follow."""
        return self.next < self.config.steps and not self.interrupted

    def moment(self) -> tuple[int, int, bool]:
        """Changes whenever there is another batch to give."""
        return self.ledger.version.attempt, self.next, self.left()

    def want_groups(self) -> bool:
        """Whether the steps that are left need another group."""
        dropped = sum(self.ledger.counts()["DROPPED"].values())
        return self.ledger.admitted - dropped < self.config.steps * self.config.groups_per_step

    async def next_groups(self) -> list[Group] | None:
        """As soon as enough are READY; None when no step is to follow."""
        while self.left():
            if groups := self.ledger.take_step():
                return groups
            self.training.room.set()  # what was dropped as stale leaves room
            await signal(self.training.scored)
        return None

    def give(self, groups: list[Group] | None) -> None:
        """Answer whoever asks for the next step's batch; None: there is no such step."""
        batch = None
        if groups is not None:
            self.metas.extend(group.meta for group in groups if group.meta is not None)
            batch = Batch(self.next, self.ledger.version, tuple(group.payload for group in groups))
        future = self.batch(self.next)
        if not future.done():
            future.set_result(batch)

    def batch(self, step: int) -> asyncio.Future[Batch | None]:
        if step not in self._batches:
            self._batches[step] = asyncio.get_running_loop().create_future()
        return self._batches[step]

    def finished(self, step: int) -> None:
        self._batches.pop(step - 1, None)
        self.next = step + 1

    def rollback(self, committed: int) -> None:
        """The steps from `committed` on are undone, and nobody waits for their batches any more."""
        self.next = committed
        for future in self._batches.values():
            future.cancel()
        self._batches.clear()

    def fail(self, reason: str) -> None:
        """Tell the ranks that wait that there will be no batch."""
        for future in self._batches.values():
            if not future.done():
                future.set_exception(RuntimeError(reason))
