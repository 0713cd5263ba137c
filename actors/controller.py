"""The controller: the asynchronous loop of stage 2 on one screen.

`produce` leases prompts to rollout workers, `score` sends what they wrote to reward workers, `train`
hands finished groups to the learners, `publish` brings their new weights to the rollout workers and
has the versions that are due validated. They share one `Ledger`, which alone decides what may be
leased, consumed or dropped; the controller holds references, never tensors. Payloads are method
return values, so the controller owns them and a dead worker takes none along.

Each part does one job, and refers only to those above it:

    training    what all of them work on
    staff       the workers of both roles: who there is, who replaces the dead
    weights     versions into rollout workers
    scoring     GENERATED groups to reward workers
    leases      PENDING groups to rollout workers
    validation  greedy text of a version, ranked
    steps       READY groups to the learners
    ranks       the learners: who there is

With `max_staleness: 0` a run repeats bit for bit, killed and resumed or not. An engine's arithmetic
depends in its last bits on what else is in the batch, so what one batch holds must follow from the
seed: the groups of a version start together, after its validation and probes, and are scored when
all are written, in the order in which they were drawn.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
import traceback
from collections.abc import Sequence
from typing import Any

import numpy as np
from ray.exceptions import ActorDiedError, RayError

from actors import checkpoints
from actors.broadcast import Answer, Order
from actors.cluster import last_words
from actors.leases import Leases
from actors.placement import Placement
from actors.ranks import Ranks
from actors.scoring import REWARD_BATCH, Scoring
from actors.staff import Staff
from actors.steps import Batch, Steps
from actors.training import Training, signal
from actors.validation import Validation
from actors.weights import Weights
from rporec.config import Config, ConfigError
from rporec.engine.types import Version
from rporec.recipes import Recipe, load_recipe
from rporec.run import Run


class Controller:
    """Made a Ray actor by `actors.reinforce`; `placement` says where its workers come from."""

    def __init__(self, run: Run, config: Config, placement: Placement, recipe: Recipe | None = None) -> None:
        self.run, self.config, self.placement = run, config, placement
        self.training = training = Training(run, config, placement, recipe or load_recipe(run, config), self._ended)
        self.ledger, self.journal, self.store = training.ledger, training.journal, training.store
        self.staff = Staff(training, lambda worker: self.weights.sync(worker))
        self.rollouts, self.rewards = self.staff.rollouts, self.staff.rewards
        self.weights = Weights(training, self.staff)
        self.scoring = Scoring(training, self.staff)
        self.leases = Leases(training, self.staff, self.scoring)
        self.validation = Validation(training, self.staff, self.weights)
        self.steps = Steps(training)
        self.ranks = Ranks(training.journal)
        self.weights_due = asyncio.Event()  # the store holds a version that workers lack
        self.state = "STARTING"
        self.failure: str | None = None
        self.starting = asyncio.Lock()
        self.main: asyncio.Task | None = None
        if placement.restarted():
            self.steps.interrupted = self.journal.remember().get("interrupted", False)
        self._write_status()

    # --- the loop ----------------------------------------------------------------------------
    async def start(self) -> None:
        """Bring up the workers and begin, unless that was done; returns when every one of them is ready."""
        async with self.starting:
            self._check()
            if self.main is not None:
                return
            try:
                await self.staff.start()
            except Exception as error:
                self._fail(error)
                raise
            if self.state == "STARTING":  # else it was stopped meanwhile, or has failed
                self.state = "RUNNING"
                self.main = asyncio.create_task(self._loop())

    async def _loop(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for part in (self.produce, self.score, self.train, self.publish, self.heartbeat):
                    group.create_task(part(), name=part.__name__)
        except* Exception as errors:
            self._fail(errors.exceptions[0])

    async def produce(self) -> None:
        """Admit prompts while the ledger has capacity; lease each to the worker that holds the fewest."""
        while True:
            while self.ledger.capacity() > 0 and self.steps.want_groups():
                self.ledger.admit(*self.training.recipe.draw(self.ledger.admitted))
            self.leases.deal()
            await signal(self.training.room)

    async def score(self) -> None:
        """Send what has been written to idle reward workers, as much at a time as has piled up."""
        while True:
            while not self.scoring.may_score():
                await signal(self.scoring.wrote)
            await self.scoring.gather()
            worker = await self.staff.idle_reward()
            worker.running = 1
            if groups := self.scoring.take_written():
                self.training.spawn(self.scoring.reward(worker, groups))
            else:  # a rollback came meanwhile
                self.staff.free(worker)

    async def train(self) -> None:
        """Give each learner step its groups: oldest version first, none beyond the staleness bound."""
        while True:
            groups = await self.steps.next_groups()
            moment = self.steps.moment()  # read now: a rollback may have come while this waited
            self.steps.give(groups)
            while self.steps.moment() == moment:
                await signal(self.steps.stepped_on)

    async def publish(self) -> None:
        """Bring each new version to every rollout worker; validate the versions that are due."""
        seen: Version | None = None
        while True:
            await signal(self.weights_due)
            version = self.ledger.version
            stored = version in await self.store.versions.remote()
            if stored and version != seen:
                seen = version
                if self.validation.due(version.number):
                    validation = await self.validation.begin(version)
                    if self.training.on_policy:
                        await asyncio.wait([validation])
                self.leases.cleared = version
                self.training.room.set()
            if stored or (self.weights.broadcasts.serving and not self.training.on_policy):
                for worker in self.rollouts.alive:
                    if worker.settled != version:
                        self.training.spawn(self.weights.sync(worker))

    async def heartbeat(self) -> None:
        while True:
            # Before `measure`: a reward worker answers it between two batches, so after it they seem idle.
            waiting = len(self.scoring.written) / REWARD_BATCH
            self.staff.observe({"rollout": self.ledger.counts()["PENDING"], "reward": waiting})
            await self.staff.measure()
            self._write_status()
            await asyncio.sleep(1.0)

    # --- what learners call ------------------------------------------------------------------
    async def learner_starts(self) -> None:
        """Rank 0 is about to load model and checkpoint; RuntimeError when that has led nowhere too often."""
        self._check()
        try:
            self.ranks.start()
        except RuntimeError as error:
            self._fail(error)
            self._check()

    async def attach(self, rank: int, pid: int, node: str, committed: int) -> int:
        """A learner rank has started from the checkpoint of step `committed`; returns the attempt.

        A rank 0 that has been here before was restarted: whatever followed that checkpoint is undone.
        """
        await self.start()  # Ray has restarted this actor, or the launcher's call is under way
        self._check()
        try:
            await self.store.versions.remote()
        except RayError as error:  # the rank would die of it again and again
            self._fail(error)
            self._check()
        again = self.ranks.attach(rank, pid, node)
        if rank == 0 and (again or committed != self.steps.next):
            await self.training.forget_lost()  # a node may have gone with the learner
            self._rollback(committed)
        return self.ledger.version.attempt

    async def learner_failed(self, rank: int, pid: int, node: str, error: BaseException) -> None:
        """The last words of a rank; Ray Train starts the group anew unless nothing can come of it."""
        self.ranks.failed(rank, pid, node, error)
        if isinstance(error, ConfigError):
            self._fail(error)

    async def attached(self, version: Version, probed: np.ndarray | None = None) -> None:
        """Rank 0 has published the weights that it started from; `probed` as in `finished_step`."""
        self._check(version.attempt)
        self.weights.probed = (version, probed)
        self.weights_due.set()

    async def next_batch(self, step: int, attempt: int) -> Batch | None:
        """The groups of `step` for every rank alike; None when the training is over or is to stop."""
        self._check(attempt)
        return await asyncio.shield(self.steps.batch(step))

    async def finished_step(
        self,
        step: int,
        version: Version,
        metrics: dict[str, Any],
        probed: np.ndarray | None = None,
        stored: Sequence[Any] = (),
    ) -> None:
        """Rank 0 has published `version`, made by `step`; what it measured goes into steps.jsonl.

        probed: its log-probabilities of the recipe's probes under `version`, which engines are to agree with.
        stored: what is awaited until the store has the version, if it may not have it yet.
        """
        self._check(version.attempt)
        for one in stored:
            self.training.spawn(self._stored(one))
        self.weights.probed = (version, probed)
        metrics = {**metrics, "loads": self.staff.mean_loads()}
        self.journal.step(metrics, list(self.steps.metas), self.ledger.counts()["DROPPED"], len(self.rewards.alive))
        self.staff.autoscale(metrics["seconds"], metrics["loads"])
        self.steps.finished(step)
        self.ledger.published(version)
        for event in (self.steps.stepped_on, self.weights_due, self.training.room, self.training.scored):
            event.set()

    async def _stored(self, reference: Any) -> None:
        with contextlib.suppress(RayError):  # the learner's failure too, and it says why
            await reference
        self.weights_due.set()

    async def next_order(self, attempt: int, answer: Answer | None) -> Order | None:
        """Which worker rank 0 is to send its weights to next; None when no more follow."""
        self._check(attempt)
        return await self.weights.broadcasts.next(attempt, answer)

    async def commit(self, step: int, attempt: int) -> None:
        """All ranks have written their part of the checkpoint: add the ledger and make it the newest."""
        self._check(attempt)
        snapshot, payloads = await self.training.snapshot(step)
        await asyncio.to_thread(checkpoints.add_ledger, self.run, self.config, step, snapshot, payloads)
        self._check(attempt)  # not undone meanwhile
        checkpoints.commit(self.run.checkpoints, step)
        self.ledger.committed(step)
        self.ranks.committed()

    # --- what the launcher calls -------------------------------------------------------------
    async def status(self) -> dict[str, Any]:
        return self._status()

    async def weight_store(self) -> Any:
        return self.store

    async def scale(self, role: str, count: int) -> list[dict[str, Any]]:
        """Have `count` workers of a role from now on; those that leave finish what they hold. Returns who there is."""
        return self.staff.scale(role, count)

    async def interrupt(self) -> None:
        """Take no further step: the learners get None, write a checkpoint and leave."""
        self.steps.interrupted = True
        self._write_status()  # a controller that is started anew is to know
        self.training.scored.set()

    async def stop(self) -> None:
        """Wait for validations under way, write the last status, end the workers."""
        if self.failure is None and not self.steps.interrupted:
            await asyncio.gather(*self.validation.under_way, return_exceptions=True)
        if self.failure is None:
            self.state = "FINISHED" if self.steps.next >= self.config.steps else "STOPPED"
        if self.main is not None:
            self.main.cancel()
            with contextlib.suppress(BaseException):
                await self.main
        self.training.cancel()
        self.ledger.cancel()
        await self.staff.measure()
        self.weights.broadcasts.end(self.ledger.version.attempt)
        self.staff.stop()
        self.ranks.stop()
        self._write_status()

    # --- inside ------------------------------------------------------------------------------
    def _rollback(self, committed: int) -> None:
        """The learner came back from an older checkpoint: later steps are undone."""
        attempt = self.ledger.version.attempt + 1
        self.weights.broadcasts.end(attempt - 1)
        self.ledger.rollback(Version(attempt, committed), committed)
        self.steps.rollback(committed)
        self.scoring.forget_undone()
        for worker in self.rollouts.alive:
            self.training.spawn(self.weights.abort(worker))
        self.journal.cut(committed)
        for event in (self.steps.stepped_on, self.training.scored, self.training.room):
            event.set()

    def _ended(self, error: BaseException) -> None:
        """Something that ran beside the loop has failed; the loop ends with it."""
        self._fail(error)
        if self.main is not None:
            self.main.cancel()

    def _fail(self, error: BaseException) -> None:
        """Whoever waits for the loop must hear of its end; the traceback goes into the controller's log."""
        traceback.print_exception(error)
        if self._lost_store(error):
            return
        own = isinstance(error, RuntimeError | ConfigError | RayError)
        self.failure = self.failure or f"{'' if own else type(error).__name__ + ': '}{last_words(error)}"
        self.state = "FAILED"
        self.steps.fail(f"the controller failed: {self.failure}")
        self.training.cancel()
        self._write_status()

    def _lost_store(self, error: BaseException) -> bool:
        """Whether it was the weight store that died. Versions are lost with it, so this process ends too:
        Ray starts it anew, with a new store, from the newest checkpoint."""
        if not (isinstance(error, ActorDiedError) and self.placement.is_store(self.store, error)):
            return False
        self.journal.died("weight store", "weight-store", 0, self.placement.here(), last_words(error))
        self._write_status()
        self.placement.restart()
        return True

    def _check(self, attempt: int | None = None) -> None:
        """Tell a learner that the loop has failed, or that it was replaced: its attempt is over."""
        if self.failure is not None:
            raise RuntimeError(f"the controller failed: {self.failure}")
        if attempt not in (None, self.ledger.version.attempt):
            raise RuntimeError(f"attempt {attempt} is over; it is {self.ledger.version.attempt} now")

    # --- what a person sees ------------------------------------------------------------------
    def _status(self) -> dict[str, Any]:
        state = "ALIVE" if self.state in ("STARTING", "RUNNING") else "STOPPED"
        me = {"role": "controller", "name": "controller", "node": self.placement.here(), "pid": os.getpid()}
        learner_cpu = sum(self.journal.learner_cpu.values()) * self.config.learners
        return {
            "state": self.state,
            "step": self.steps.next,
            "steps": self.config.steps,
            "version": self.ledger.version.number,
            "attempt": self.ledger.version.attempt,
            "groups": self.ledger.counts(),
            "admitted": self.ledger.admitted,
            "returned": dict(self.ledger.events),
            "lengths": self.ledger.lengths(),
            "actors": [{**me, "state": state}, *self.staff.describe(), *self.ranks.describe()],
            "last_step": self.journal.last_step,
            "best": self.journal.best,
            "cpu_seconds": self.training.earlier_cpu + self.staff.cpu_seconds + learner_cpu,
            "deaths": list(self.journal.deaths),
            "notices": list(self.journal.notices),
            "failure": self.failure,
            "interrupted": self.steps.interrupted,
            "time": time.time(),
        }

    def _write_status(self) -> None:
        self.journal.write_status(self._status())
