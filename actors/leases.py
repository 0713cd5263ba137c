"""Leases: prompts that the ledger has admitted go to rollout workers, and what those wrote goes to scoring."""

from __future__ import annotations

import asyncio
import itertools

from ray.exceptions import RayError

from actors.scoring import Scoring
from actors.staff import Staff
from actors.training import Training
from actors.workers import Worker, answer, is_death
from rporec.rl.ledger import Group
from rporec.rl.rollout_schema import GroupMeta, Lease


class Leases:
    """PENDING groups become GENERATED."""

    def __init__(self, training: Training, staff: Staff, scoring: Scoring) -> None:
        self.training, self.staff, self.scoring = training, staff, scoring
        self.ledger, self.recipe = training.ledger, training.recipe

    def deal(self) -> None:
        """Lease what may be leased now."""
        if self.training.on_policy:
            self._lease_together()
        else:
            self._lease_freely()

    def _lease_freely(self) -> None:
        """To the worker that holds the fewest, as long as one has a free slot."""
        while free := [worker for worker in self.staff.rollouts.alive if self._may_lease(worker)]:
            if not self._lease(min(free, key=lambda worker: worker.running)):
                break

    def _lease_together(self) -> None:
        """All that may be leased, in turn, once nothing is under way; each engine begins when it has its share."""
        workers = sorted(self.staff.rollouts.alive, key=lambda worker: worker.place)
        ready = all(worker.settled == self.ledger.version and not worker.validating for worker in workers)
        if not workers or not ready or self.ledger.under_way:
            return
        for worker in workers:
            worker.actor.pause.remote()
        for worker in itertools.cycle(workers):
            if not self._lease(worker):
                break
        for worker in workers:
            self.training.spawn(self._resume(worker))

    def _may_lease(self, worker: Worker) -> bool:
        """Not to a worker whose tokens would be too old, or of an undone attempt, when they are consumed."""
        fresh = worker.version.attempt == self.ledger.version.attempt and self.ledger.admits(worker.version.number)
        return fresh and not worker.validating and worker.running < worker.slots

    def _lease(self, worker: Worker) -> bool:
        group = self.ledger.lease(worker.name)
        if group is None:
            return False
        worker.running += 1
        self.training.spawn(self._generate(worker, group))
        return True

    async def _resume(self, worker: Worker) -> None:
        worker.actor.resume.remote()  # a task, so that it comes after those of the leases

    async def _generate(self, worker: Worker, group: Group) -> None:
        (prompt,) = self.recipe.prompts([group.sample])
        lease = Lease(group.id, group.sample, prompt, group.seed)
        clock = asyncio.get_running_loop().time  # the loop's own: it may be simulated
        began = clock()
        payload, meta = worker.actor.generate.remote(lease, self.recipe.rollout_spec(lease.seed))
        try:
            described: GroupMeta = await answer(meta, self.training.config.engine.timeout)
        except (RayError, TimeoutError) as error:
            if is_death(error):
                self.staff.lost(worker, error)
            else:
                self.training.failed(group, error)
        else:
            self.training.in_a_row["rollout"] = 0
            if generated := self.ledger.generated(group, payload, described):
                self.training.journal.generated(described.tokens, clock() - began)
                self.scoring.written.append(generated)
        finally:
            worker.running -= 1
            self.scoring.wrote.set()
            self.training.room.set()
