"""Validation: what one version writes for fixed samples, judged; the best version is kept."""

from __future__ import annotations

import asyncio
from typing import Any

from ray.exceptions import RayError

from actors.staff import Staff
from actors.training import Training
from actors.weights import Weights
from actors.workers import answer, is_death
from rporec.config import ConfigError
from rporec.engine.types import GenerationAborted, Version
from rporec.promotion import better, promote


class Validation:
    """Validates versions, one after the other: each is compared with the best so far."""

    def __init__(self, training: Training, staff: Staff, weights: Weights) -> None:
        self.training, self.staff, self.weights = training, staff, weights
        self.config = training.config
        self.under_way: set[asyncio.Task] = set()
        self._one_at_a_time = asyncio.Lock()

    def due(self, number: int) -> bool:
        """Every so many versions, but for one that two others wait before: each holds its weights until then."""
        every = number % self.config.rl.validate_every == 0
        return number == self.config.steps or (every and len(self.under_way) < 2)

    async def begin(self, version: Version) -> asyncio.Task:
        """Validate a version that the store has, beside the loop."""
        await self.training.store.pin.remote(version)  # until it is validated, however many follow it
        task = self.training.spawn(self._validate(version))
        self.under_way.add(task)
        task.add_done_callback(self.under_way.discard)
        return task

    async def _validate(self, version: Version) -> None:
        """What one pinned version writes for the fixed validation samples, judged."""
        journal, store = self.training.journal, self.training.store
        async with self._one_at_a_time:
            try:
                written = await self._write(version)
                result = None if written is None else await self._judged(written)
                if result is None or self._undone(version):
                    return
                record = {"step": version.number, "version": version.number, "attempt": version.attempt, **result}
                if journal.validated(record):
                    best, model = self.training.run.best_model, self.training.recipe.model
                    await store.save.remote(version, str(best), str(model))
                    journal.saved_best(record)
                    await self._promote(version, record["ndcg@10"])
            finally:
                await store.unpin.remote(version)

    async def _write(self, version: Version) -> list[list[dict[str, Any]]] | None:
        """By the first worker that lives to the end of it; None when the version is undone meanwhile."""
        _, prompts, specs = self.training.recipe.validation
        while not self._undone(version):
            if not self.staff.rollouts.alive:
                await asyncio.sleep(1.0)
                continue
            worker = self.staff.rollouts.alive[0]
            async with worker.weights:
                worker.validating = True
                try:
                    if not self._undone(version) and await self.weights.load(worker, version):
                        writing = worker.actor.generate_many.remote(prompts, specs)
                        return await answer(writing, self.config.engine.timeout)
                except (RayError, TimeoutError) as error:
                    if is_death(error):
                        self.staff.lost(worker, error)
                    elif not isinstance(error, GenerationAborted):
                        raise
                finally:
                    worker.validating = False
                    self.training.spawn(self.weights.sync(worker))  # newer versions may have waited behind this one
                    self.training.room.set()
        return None

    async def _judged(self, written: list[list[dict[str, Any]]]) -> dict[str, float]:
        samples, _, _ = self.training.recipe.validation
        while True:
            worker = await self.staff.idle_reward()
            worker.running = 1  # one that is to leave finishes this too
            try:
                return await asyncio.wait_for(
                    worker.actor.validate.remote(samples, written), self.config.reward.timeout
                )
            except (RayError, TimeoutError) as error:
                if not isinstance(error, TimeoutError) and not is_death(error):
                    raise
                self.staff.lost(worker, error)
            finally:
                self.staff.free(worker)

    async def _promote(self, version: Version, ndcg: float) -> None:
        run, rule = self.training.run, self.config.promotion
        if self.config.recipe == "rporec" and rule.automatic and better(run, ndcg, rule.min_gain):
            try:
                await asyncio.to_thread(promote, run, str(version), run.best_model, ndcg)
            except (OSError, ConfigError) as error:  # a full disk, say: serving stays behind, training goes on
                self.training.journal.notice(f"version {version} was not promoted: {error}")

    def _undone(self, version: Version) -> bool:
        return version.attempt != self.training.ledger.version.attempt
