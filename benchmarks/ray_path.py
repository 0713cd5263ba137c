"""The Ray path apart: a real ledger before actors on Ray that answer at once; part of `rporec bench control-plane`.

Each group takes the way of stage 2: leased from the ledger, sent to a rollout actor that returns rows and
their `GroupMeta`, the rows passed by reference to a reward actor that returns them, and by reference to a
learner actor that reads them, one step's groups a call. There is no engine, head or model, and none of the
controller's own work: what is left is Ray's calls and the copying of rows. `by` is how many groups a
generate call and a score call may hold; stage 2 sends one a generate call and scores what has piled up.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from actors.cluster import connected
from rporec.config import parse_config
from rporec.engine.types import FIRST_VERSION, Generated, Version
from rporec.rl.ledger import Group, Ledger
from rporec.rl.rollout_schema import GroupMeta, Lease, group_meta, rollout_batch

ROLLOUTS, OPEN = 2, 8  # actors; calls that each of them has open
GROUPS, SIZE, PROMPT, TOKENS = 64, 4, 64, 32  # of a step, of a group, of a prompt, of a completion


@ray.remote(num_cpus=0)
class Null:
    """Rollout worker, reward worker or learner, with the answer at hand."""

    def __init__(self) -> None:
        zeros = np.zeros(TOKENS, np.float32)
        one = Generated(zeros.astype(np.int32), zeros, ((FIRST_VERSION, 0, TOKENS),), "length", "x" * TOKENS)
        self.rows = rollout_batch(_lease(0), [one] * SIZE, [["x"] * TOKENS] * SIZE)
        self.meta = group_meta(self.rows)

    def ready(self) -> bool:
        return True

    def generate(self, leases: list[Lease], version: Version) -> tuple[Any, ...]:
        """The rows of each, one return value each, and last their metas, as if `version` had sampled them."""
        return (*[self.rows] * len(leases), [replace(self.meta, versions=(version,))] * len(leases))

    def score(self, metas: list[GroupMeta], *batches: pa.RecordBatch) -> tuple[Any, ...]:
        return (*batches, metas)

    def consume(self, payloads: list[Any]) -> int:
        """Read the rows that the references stand for; returns how many groups they are."""
        return sum(batch.num_rows for batch in ray.get(payloads)) // SIZE


class RayPath:
    """One way through all actors; its coroutines are one for each call that may be open."""

    def __init__(self, by: int) -> None:
        self.by = by
        self.ledger = Ledger(max_staleness=1, groups_per_step=GROUPS)
        self.rollouts = [Null.remote() for _ in range(ROLLOUTS)]
        self.reward, self.learner = Null.remote(), Null.remote()
        self.room, self.ready = asyncio.Event(), asyncio.Event()
        self.written: asyncio.Queue[Group] = asyncio.Queue()

    async def run(self, steps: int) -> tuple[int, float]:
        """(groups that the learner has read, wall seconds), once all actors stand."""
        actors = [*self.rollouts, self.reward, self.learner]
        await asyncio.gather(*(actor.ready.remote() for actor in actors))
        began = time.perf_counter()
        learning = asyncio.create_task(self._learn(steps))
        beside = [asyncio.create_task(self._generate(worker)) for worker in self.rollouts for _ in range(OPEN)]
        beside += [asyncio.create_task(self._score()) for _ in range(OPEN)]
        try:
            done, _ = await asyncio.wait([learning, *beside], return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()  # raises what one of them died of
            return learning.result(), time.perf_counter() - began
        finally:
            for task in (learning, *beside):
                task.cancel()
            for actor in actors:
                ray.kill(actor)

    async def _generate(self, worker: Any) -> None:
        while True:
            while self.ledger.capacity():
                self.ledger.admit(0, 0)
            leased = (self.ledger.lease("rollout") for _ in range(self.by))
            groups = [group for group in leased if group is not None]
            if not groups:
                await _signal(self.room)
                continue
            leases = [_lease(group.id) for group in groups]
            asked = worker.generate.options(num_returns=len(groups) + 1).remote(leases, self.ledger.version)
            for group, payload, meta in await _answers(groups, asked):
                if written := self.ledger.generated(group, payload, meta):
                    self.written.put_nowait(written)

    async def _score(self) -> None:
        while True:
            groups = [await self.written.get()]
            while len(groups) < self.by and not self.written.empty():
                groups.append(self.written.get_nowait())
            metas, payloads = [group.meta for group in groups], [group.payload for group in groups]
            asked = self.reward.score.options(num_returns=len(groups) + 1).remote(metas, *payloads)
            for group, payload, meta in await _answers(groups, asked):
                if scored := self.ledger.scored(group, payload, meta):
                    self.ledger.ready(scored)
            self.ready.set()

    async def _learn(self, steps: int) -> int:
        read = 0
        for step in range(1, steps + 1):
            while (groups := self.ledger.take_step()) is None:
                self.room.set()  # what was dropped as stale leaves room
                await _signal(self.ready)
            read += await self.learner.consume.remote([group.payload for group in groups])
            self.ledger.published(Version(0, step))
            self.ledger.committed(step)
            self.room.set()
        return read


async def _answers(groups: list[Group], references: list[Any]) -> list[tuple[Group, Any, GroupMeta]]:
    *payloads, metas = references
    return list(zip(groups, payloads, await metas, strict=True))


async def _signal(event: asyncio.Event) -> None:
    event.clear()
    await event.wait()


def _lease(number: int) -> Lease:
    return Lease(number, number, np.zeros(PROMPT, np.int32), number)


def measure(sizes: tuple[int, ...], steps: int) -> dict[int, tuple[int, float]]:
    """For each number of groups in a call: (groups, wall seconds) of `steps` steps, on a cluster started here."""
    with connected(parse_config({}), None, "rporec-bench"):
        return {by: asyncio.run(_measure(by, steps)) for by in sizes}


async def _measure(by: int, steps: int) -> tuple[int, float]:
    return await RayPath(by).run(steps)
