"""Leases: prompts that the ledger has admitted go to rollout workers, and what those wrote goes to scoring."""

from __future__ import annotations

import asyncio
import itertools
import math
from typing import Any

from ray.exceptions import RayError

from actors.scoring import Scoring
from actors.staff import Staff
from actors.training import Training
from actors.workers import Worker, answer, is_death
from rporec.engine.types import Version
from rporec.rl.ledger import Group
from rporec.rl.rollout_schema import Lease


class Leases:
    """PENDING groups become GENERATED."""

    def __init__(self, training: Training, staff: Staff, scoring: Scoring) -> None:
        self.training, self.staff, self.scoring = training, staff, scoring
        self.ledger, self.recipe = training.ledger, training.recipe
        self.cleared: Version | None = None  # validated if that was due: on-policy groups may be leased under it

    def deal(self) -> None:
        """Lease what may be leased now."""
        if self.training.on_policy:
            self._lease_together()
        else:
            self._lease_freely()

    def _lease_freely(self) -> None:
        """To the worker that holds the fewest, as long as one has a free slot."""
        while free := [worker for worker in self.staff.rollouts.alive if self._may_lease(worker)]:
            worker = min(free, key=lambda worker: worker.running)
            if (group := self.ledger.lease(worker.name)) is None:
                break
            self._hand_out(worker, [group])

    def _may_lease(self, worker: Worker) -> bool:
        """Not to a worker whose tokens would be too old, or of an undone attempt, when they are consumed."""
        fresh = worker.version.attempt == self.ledger.version.attempt and self.ledger.admits(worker.version.number)
        return fresh and not worker.validating and worker.running < worker.slots

    def _lease_together(self) -> None:
        """All that may be leased, in turn, once nothing is under way; each engine begins when it has its share."""
        workers, version = sorted(self.staff.rollouts.alive, key=lambda worker: worker.place), self.ledger.version
        ready = self.cleared == version and all(worker.settled == version for worker in workers)
        if not workers or not ready or self.ledger.under_way:
            return
        shares: dict[str, list[Group]] = {worker.name: [] for worker in workers}
        for worker in itertools.cycle(workers):
            if (group := self.ledger.lease(worker.name)) is None:
                break
            shares[worker.name].append(group)
        for worker in workers:
            if share := shares[worker.name]:
                self._hand_out(worker, share)

    def _hand_out(self, worker: Worker, groups: list[Group]) -> None:
        worker.running += len(groups)
        self.training.spawn(self._generate(worker, groups))

    async def _generate(self, worker: Worker, groups: list[Group]) -> None:
        """One group that joins whatever the engine is writing, or several that start together."""
        training = self.training
        clock = asyncio.get_running_loop().time  # the loop's own: it may be simulated
        began = clock()
        try:
            payloads, metas = await self._written_by(worker, groups)
        except (RayError, TimeoutError) as error:
            if is_death(error):
                self.staff.lost(worker, error)
            else:
                for group in groups:
                    training.failed(group, error)
        else:
            training.in_a_row["rollout"] = 0
            for group, payload, meta in zip(groups, payloads, metas, strict=True):
                if isinstance(meta, BaseException):
                    training.failed(group, meta)
                elif generated := self.ledger.generated(group, payload, meta):
                    training.journal.generated(meta.tokens, clock() - began)
                    self.scoring.written.append(generated)
        finally:
            worker.running -= len(groups)
            self.scoring.wrote.set()
            training.room.set()

    async def _written_by(self, worker: Worker, groups: list[Group]) -> tuple[list[Any], list[Any]]:
        """References to the rows of each group; what each amounts to, or why it failed."""
        prompts = self.recipe.prompts([group.sample for group in groups])
        leases = [Lease(one.id, one.sample, prompt, one.seed) for one, prompt in zip(groups, prompts, strict=True)]
        spec = self.recipe.rollout_spec(leases[0].seed)  # a worker takes the seed from the lease
        patience = self.training.config.engine.timeout * math.ceil(len(groups) / worker.slots)
        if not self.training.on_policy:
            payload, meta = worker.actor.generate.remote(leases[0], spec)
            return [payload], [await answer(meta, patience, "engine.timeout")]
        together = worker.actor.generate_together.options(num_returns=len(groups) + 1)
        *payloads, report = together.remote(leases, spec)
        return payloads, await answer(report, patience, "engine.timeout")
