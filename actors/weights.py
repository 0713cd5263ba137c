"""The weights of rollout workers: the newest version enters each of them, from the learner or from the store."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
from ray.exceptions import RayError, RayTaskError

from actors.broadcast import Broadcasts
from actors.staff import Staff
from actors.training import Training
from actors.workers import Worker, answer, is_death
from rporec.engine.types import GenerationAborted, Version


class Weights:
    """Brings versions into rollout workers; `probed` is what the learner said of the probes under the newest."""

    def __init__(self, training: Training, staff: Staff) -> None:
        self.training, self.staff = training, staff
        self.ledger, self.timeout = training.ledger, training.config.engine.timeout
        self.broadcasts = Broadcasts(staff.rollouts, training.journal.notice)
        self.probed: tuple[Version | None, np.ndarray | None] = (None, None)

    async def sync(self, worker: Worker) -> None:
        """The newest weights enter between two decode steps; running generations go on under them."""
        async with worker.weights:
            newest = self.ledger.version  # read now: a newer one may have come while this waited
            if worker.state != "ALIVE" or worker.settled == newest:
                return
            if await self.load(worker, newest) and self.probed[0] == newest:
                await self._probe(worker)
                worker.settled = newest
                self.training.room.set()

    async def load(self, worker: Worker, version: Version) -> bool:
        """Bring a version into a worker; False when it died of that, or the store does not have the version."""
        if worker.version == version:
            return True
        clock = asyncio.get_running_loop().time  # the loop's own: it may be simulated
        began = clock()
        worker.settled = None  # whatever version that was: it is to come back to the newest
        newest = version == self.ledger.version  # the learner holds no other
        if not (newest and await self.broadcasts.bring(worker, version)):
            stored = await self._stored(version)
            if stored is None or not await self._taken(worker, version, stored):
                return False
        worker.version = version
        self.training.journal.brought(clock() - began)
        self.training.room.set()
        return True

    async def _stored(self, version: Version) -> Any:
        """Its reference; None while the store has yet to take it, or when newer ones have taken its place."""
        store = self.training.store
        if version not in await store.versions.remote():
            return None
        try:
            return await store.get.remote(version)
        except RayTaskError as error:
            if not isinstance(error.cause, KeyError):
                raise
            return None

    async def _taken(self, worker: Worker, version: Version, stored: Any) -> bool:
        try:
            taking = worker.actor.update_weights.remote(version, stored)
            await answer(taking, self.broadcasts.patience or self.timeout, "engine.timeout, or less after a broadcast")
        except (RayError, TimeoutError) as error:
            if not is_death(error):
                raise
            self.staff.lost(worker, error)
            return False
        return True

    async def abort(self, worker: Worker) -> None:
        """Stop what runs under weights that are undone."""
        try:
            await answer(worker.actor.abort_all.remote(), self.timeout, "engine.timeout")
        except (RayError, TimeoutError) as error:
            self.staff.lost(worker, error)

    async def _probe(self, worker: Worker) -> None:
        """What the engine says of the probes under its new weights, against what the learner said of them."""
        version, expected = self.probed
        if expected is None or worker.version != version:
            return
        try:
            scoring = worker.actor.score_prompts.remote(self.training.recipe.probes)
            scored = await answer(scoring, self.timeout, "engine.timeout")
        except (RayError, TimeoutError) as error:
            if is_death(error):
                self.staff.lost(worker, error)
            elif not isinstance(error, GenerationAborted):
                raise
        else:
            self.training.journal.probed(np.abs(np.concatenate(scored) - expected))
