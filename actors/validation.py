"""Validation: what one version writes for fixed samples, judged; the best version is kept."""

from __future__ import annotations

import asyncio
import math
from typing import Any

from ray.exceptions import RayError

from actors.cluster import last_words
from actors.scoring import REWARD_BATCH
from actors.staff import Staff
from actors.training import Training
from actors.weights import Weights
from actors.workers import answer, is_death
from rporec.config import ConfigError
from rporec.engine.types import GenerationAborted, Version
from rporec.promotion import better, promote

# Workers of a role that one version may cost: off policy others go on meanwhile, so no row of losses would end it.
TRIES = 3


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
                result = None if written is None else await self._judged(version, written)
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
        """By the first worker that lives to the end of it; None when the version is undone meanwhile, or, with a
        notice, when `TRIES` did not."""
        _, prompts, specs = self.training.recipe.validation
        lost = 0
        while lost < TRIES and not self._undone(version):
            if not self.staff.rollouts.alive:
                await asyncio.sleep(1.0)
                continue
            worker = self.staff.rollouts.alive[0]
            async with worker.weights:
                worker.validating = True
                try:
                    if not self._undone(version) and await self.weights.load(worker, version):
                        writing = worker.actor.generate_many.remote(prompts, specs)
                        return await answer(writing, self.config.engine.timeout, "engine.timeout")
                except (RayError, TimeoutError) as error:
                    if is_death(error):
                        self.staff.lost(worker, error)
                        lost += 1
                        self._lost(version, "rollout", lost, error)
                    elif not isinstance(error, GenerationAborted):
                        raise
                finally:
                    worker.validating = False
                    self.training.spawn(self.weights.sync(worker))  # newer versions may have waited behind this one
                    self.training.room.set()
        return None

    async def _judged(self, version: Version, written: list[list[dict[str, Any]]]) -> dict[str, float] | None:
        """By the first reward worker that lives to the end of it; None, with a notice, when `TRIES` did not."""
        samples, _, _ = self.training.recipe.validation
        patience = self.config.reward.timeout * max(1, math.ceil(len(samples) / REWARD_BATCH))
        for lost in range(1, TRIES + 1):
            worker = await self.staff.idle_reward()
            worker.running = 1  # one that is to leave finishes this too
            try:
                judging = worker.actor.validate.remote(samples, written)
                return await answer(judging, patience, f"reward.timeout for each {REWARD_BATCH} samples")
            except (RayError, TimeoutError) as error:
                if not is_death(error):
                    raise
                self.staff.lost(worker, error)
                self._lost(version, "reward", lost, error)
            finally:
                self.staff.free(worker)
        return None

    def _lost(self, version: Version, role: str, number: int, error: BaseException) -> None:
        """The `number`-th worker of a role was lost over one version; the last of them is worth a notice."""
        if number == TRIES:
            said = f"version {version} is not validated: {TRIES} {role} workers were lost over it"
            self.training.journal.notice(f"{said}; the last: {last_words(error)}")

    async def _promote(self, version: Version, ndcg: float) -> None:
        run, rule = self.training.run, self.config.promotion
        if self.config.recipe == "rporec" and rule.automatic and better(run, ndcg, rule.min_gain):
            try:
                await asyncio.to_thread(promote, run, str(version), run.best_model, ndcg)
            except (OSError, ConfigError) as error:  # a full disk, say: serving stays behind, training goes on
                self.training.journal.notice(f"version {version} was not promoted: {error}")

    def _undone(self, version: Version) -> bool:
        return version.attempt != self.training.ledger.version.attempt
