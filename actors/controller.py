"""The controller: the asynchronous loop of stage 2 on one screen.

`produce` leases prompts to rollout workers, `score` sends what they wrote to reward workers, `train`
hands finished groups to the learners, `publish` brings their new weights to the rollout workers and
has the versions that are due validated. They share one `Ledger`, which alone decides what may be
leased, consumed or dropped; the controller holds references, never tensors. Payloads are method
return values, so the controller owns them and a dead worker takes none along.

With `max_staleness: 0` a run repeats bit for bit, killed and resumed or not. An engine's arithmetic
depends in its last bits on what else is in the batch, so what one batch holds must follow from the
seed: the groups of a version start together, after its validation and probes, and are scored when
all are written, in the order in which they were drawn.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import time
import traceback
from collections import Counter, deque
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
from ray.exceptions import ActorDiedError, ObjectLostError, RayError, RayTaskError

from actors import checkpoints
from actors.broadcast import Answer, Broadcasts, Order
from actors.cluster import last_words
from actors.journal import Journal
from actors.placement import Placement
from actors.workers import Worker, Workers
from rporec.config import Config, ConfigError
from rporec.engine.types import EngineError, GenerationAborted, Version
from rporec.files import read_json
from rporec.recipes import Recipe, load_recipe
from rporec.rl.elastic import Autoscaler
from rporec.rl.ledger import Group, Ledger
from rporec.rl.rollout_schema import GroupMeta, Lease
from rporec.run import Run

# Groups that one reward call may hold: enough to batch, few enough to return within a second.
REWARD_BATCH = 32
# One bad prompt is dropped; so many in a row, with none that came through, are another fault.
POISONED_IN_A_ROW = 16
# Workers of one role that die in a row, with no result between: what they are given kills them.
LOST_IN_A_ROW = 8
# Steps' worth of flat groups in a row after which dynamic sampling would draw for ever.
FLAT_STEPS = 20
# Of the learner group from one checkpoint, after which it is given up.
MAX_RESTARTS = 3
# Seconds before each try to replace a dead worker; the last one again and again.
REPLACEMENT_PAUSES = (0.0, 2.0, 10.0)


@dataclass(frozen=True)
class Batch:
    """One learner step's groups, in the order in which they are consumed."""

    step: int
    version: Version
    payloads: tuple[Any, ...]  # references to record batches


class Controller:
    """Made a Ray actor by `actors.reinforce`; `placement` says where its workers come from."""

    def __init__(self, run: Run, config: Config, placement: Placement, recipe: Recipe | None = None) -> None:
        self.run, self.config, self.placement = run, config, placement
        self.recipe = recipe or load_recipe(run, config)
        self.journal = Journal(run, config.groups_per_step)
        self.earlier_cpu = 0.0  # CPU seconds of stage 2 before this process
        self.ledger = self._open_ledger()
        self.store: Any = placement.store()
        slots = max(1, config.engine.max_num_seqs // config.group_size)
        self.rollouts = Workers("rollout", config.rollout_workers.min, slots, self._start_rollout, placement.kill)
        self.rewards = Workers("reward", config.reward_workers.min, 1, self._start_reward, placement.kill)
        self.broadcasts = Broadcasts(self.rollouts, self.journal.notice)
        self.step = self.ledger.step  # the learner's next one
        self.state = "STARTING"
        self.learners: list[dict[str, Any]] = []
        self.room = asyncio.Event()  # a lease may have become possible
        self.scored = asyncio.Event()  # a group may have become READY
        self.stepped_on = asyncio.Event()  # the learner has finished a step, or was rolled back
        self.weights_due = asyncio.Event()  # the store holds a version that workers lack
        self.wrote = asyncio.Event()  # `written` has grown, or the last group that ran has ended
        self.written: list[Group] = []  # to be scored
        self.suspects: set[int] = set()  # groups to be scored alone: a batch with them has failed
        self.idle_rewards: asyncio.Queue[Worker] = asyncio.Queue()
        self.cleared: Version | None = None  # validated if it was due
        self.batches: dict[int, asyncio.Future[Batch | None]] = {}
        self.metas: deque[GroupMeta] = deque(maxlen=config.groups_per_step)  # of the newest learner step
        self.in_a_row = Counter[str]()  # "poisoned", "flat" groups and lost workers by role, since one that was not
        self.loads: list[dict[str, float]] = []  # of each role, at the heartbeats of this learner step
        elastic = {"rollout": config.rollout_workers, "reward": config.reward_workers}
        bounds = {role: (asked.min, asked.max) for role, asked in elastic.items() if asked.min < asked.max}
        self.scaler = Autoscaler(bounds)
        self.tasks: set[asyncio.Task] = set()
        self.main: asyncio.Task | None = None
        self.probed: tuple[Version, np.ndarray | None] = (self.ledger.version, None)
        self.starts = 0  # of the learner group, since its last commit and with the one that made it
        self.starting = asyncio.Lock()
        self.validating = asyncio.Lock()  # one version after the other: each is compared with the best so far
        self.interrupted = False
        self.failure: str | None = None
        if placement.restarted():
            self._remember()
        self._write_status()

    # --- the loop ----------------------------------------------------------------------------
    async def start(self) -> None:
        """Bring up the workers and begin, unless that was done; returns when every one of them is ready."""
        async with self.starting:
            self._check()
            if self.main is not None:
                return
            roles = (self.rollouts, self.rewards)
            try:
                await asyncio.gather(*(self._add(role, place) for role in roles for place in range(role.wanted)))
            except Exception as error:
                self._fail(error)
                raise
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
            while self.ledger.capacity() > 0 and self._wanted():
                self.ledger.admit(*self.recipe.draw(self.ledger.admitted))
            if self._on_policy:
                self._lease_together()
            else:
                self._lease_freely()
            await _signal(self.room)

    async def score(self) -> None:
        """Send what has been written to idle reward workers, as much at a time as has piled up."""
        while True:
            while not self._may_score():
                await _signal(self.wrote)
            worker = await self._idle_reward()
            worker.running = 1
            self._spawn(self._reward(worker, self._take_written()))

    async def train(self) -> None:
        """Give each learner step its groups: oldest version first, none beyond the staleness bound."""
        while True:
            groups = await self._next_groups()
            moment = self._moment()  # read now: a rollback may have come while this waited
            if groups is None:
                self._give(None)
            else:
                self.metas.extend(group.meta for group in groups if group.meta is not None)
                self._give(Batch(self.step, self.ledger.version, tuple(group.payload for group in groups)))
            while self._moment() == moment:
                await _signal(self.stepped_on)

    async def publish(self) -> None:
        """Bring each new version to every rollout worker; validate the versions that are due."""
        seen: Version | None = None
        while True:
            await _signal(self.weights_due)
            version = self.ledger.version
            stored = version in await self.store.versions.remote()
            if stored and version != seen:
                seen = version
                if self._validates(version.number):
                    await self.store.pin.remote(version)  # until it is validated, however many follow it
                    validation = self._spawn(self._validate(version))
                    if self._on_policy:
                        await asyncio.wait([validation])
                self.cleared = version
                self.room.set()
            if stored or (self.broadcasts.serving and not self._on_policy):
                for worker in self.rollouts.alive:
                    if worker.settled != version:
                        self._spawn(self._sync(worker))

    async def heartbeat(self) -> None:
        while True:
            # Before `measure`: a reward worker answers it between two batches, so after it they seem idle.
            queues = {"rollout": self.ledger.counts()["PENDING"], "reward": len(self.written) / REWARD_BATCH}
            self.loads.append({role: self._workers(role).load(queued) for role, queued in queues.items()})
            await asyncio.gather(self.rollouts.measure(), self.rewards.measure())
            self._write_status()
            await asyncio.sleep(1.0)

    # --- one group, one worker ---------------------------------------------------------------
    def _lease_freely(self) -> None:
        """To the worker that holds the fewest, as long as one has a free slot."""
        while free := [worker for worker in self.rollouts.alive if self._may_lease(worker)]:
            worker = min(free, key=lambda worker: worker.running)
            if (group := self.ledger.lease(worker.name)) is None:
                break
            self._hand_out(worker, [group])

    def _lease_together(self) -> None:
        """All that may be leased, in turn, once nothing is under way; each engine begins when it has its share."""
        workers = sorted(self.rollouts.alive, key=lambda worker: worker.place)
        version = self.ledger.version
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
        self._spawn(self._generate(worker, groups))

    async def _generate(self, worker: Worker, groups: list[Group]) -> None:
        """One group that joins whatever the engine is writing, or several that start together."""
        clock = asyncio.get_running_loop().time  # the loop's own: it may be simulated
        began = clock()
        try:
            payloads, metas = await self._written_by(worker, groups)
        except (RayError, TimeoutError) as error:
            if _is_death(error):
                self._lost(worker, error)
            else:
                for group in groups:
                    self._failed(group, error)
        else:
            self.in_a_row["rollout"] = 0
            for group, payload, meta in zip(groups, payloads, metas, strict=True):
                if isinstance(meta, BaseException):
                    self._failed(group, meta)
                elif generated := self.ledger.generated(group, payload, meta):
                    self.journal.generated(meta.tokens, clock() - began)
                    self.written.append(generated)
        finally:
            worker.running -= len(groups)
            self.wrote.set()
            self.room.set()

    async def _written_by(self, worker: Worker, groups: list[Group]) -> tuple[list[Any], list[Any]]:
        """References to the rows of each group; what each amounts to, or why it failed."""
        prompts = self.recipe.prompts([group.sample for group in groups])
        leases = [Lease(one.id, one.sample, prompt, one.seed) for one, prompt in zip(groups, prompts, strict=True)]
        spec = self.recipe.rollout_spec(leases[0].seed)  # a worker takes the seed from the lease
        if not self._on_policy:
            payload, meta = worker.actor.generate.remote(leases[0], spec)
            return [payload], [await self._answer(meta)]
        together = worker.actor.generate_together.options(num_returns=len(groups) + 1)
        *payloads, report = together.remote(leases, spec)
        return payloads, await self._answer(report)

    async def _answer(self, reference: Any, patience: float | None = None) -> Any:
        """What a rollout worker says within `patience` seconds, or engine.timeout; TimeoutError when it hangs."""
        seconds = patience or self.config.engine.timeout
        try:
            return await asyncio.wait_for(reference, seconds)
        except TimeoutError:
            raise TimeoutError(f"no answer within {seconds:g} s (engine.timeout, or less for weights)") from None

    @property
    def _on_policy(self) -> bool:
        return self.config.max_staleness == 0

    def _may_score(self) -> bool:
        return bool(self.written) and (not self._on_policy or not self.ledger.running)

    def _take_written(self) -> list[Group]:
        """As much as has piled up; a suspect alone."""
        if self._on_policy:
            self.written.sort(key=lambda group: group.id)
        pile = self.written[:REWARD_BATCH]
        suspect = next((at for at, group in enumerate(pile) if group.id in self.suspects), len(pile))
        taken = pile[: max(1, suspect)]
        del self.written[: len(taken)]
        return taken

    async def _reward(self, worker: Worker, groups: list[Group]) -> None:
        began = time.monotonic()
        *scored, report = worker.actor.score.options(num_returns=len(groups) + 1).remote(
            *(group.payload for group in groups)
        )
        try:
            metas: list[GroupMeta] = await asyncio.wait_for(report, self.config.reward.timeout)
        except (RayError, TimeoutError) as error:
            self._unscored(worker, groups, error)
        else:
            self.in_a_row["reward"] = 0
            for group, payload, meta in zip(groups, scored, metas, strict=True):
                if judged := self.ledger.scored(group, payload, meta):
                    self._judged(judged, meta)
        finally:
            worker.running = 0
            self.journal.reward_seconds += time.monotonic() - began
            self.idle_rewards.put_nowait(worker)
            self.scored.set()
            self.room.set()

    def _unscored(self, worker: Worker, groups: list[Group], error: BaseException) -> None:
        """Try again elsewhere if the worker is gone, else one by one: only the culprit is to pay with a try."""
        if isinstance(error, TimeoutError):
            error = TimeoutError(f"no answer within reward.timeout: {self.config.reward.timeout:g} s")
        if gone := isinstance(error, TimeoutError) or _is_death(error):
            self._lost(worker, error)
        if len(groups) == 1 and (not gone or groups[0].id in self.suspects):
            self._failed(groups[0], error)
            return
        self.suspects.update(group.id for group in groups)
        self.written += groups
        self.wrote.set()

    def _judged(self, group: Group, meta: GroupMeta) -> None:
        self.suspects.discard(group.id)
        self.in_a_row["poisoned"] = 0
        self.in_a_row["flat"] = self.in_a_row["flat"] + 1 if meta.flat else 0
        self.journal.seen.update(scored=1, flat=int(meta.flat))
        if not (meta.flat and self.config.rl.dynamic_sampling):
            self.ledger.ready(group)
            return
        self.ledger.drop(group, "flat")
        if self.in_a_row["flat"] >= FLAT_STEPS * self.config.groups_per_step:
            raise RuntimeError(
                f"the last {self.in_a_row['flat']} groups had one reward each, so rl.dynamic_sampling drops them all: "
                "the policy has collapsed; raise rl.kl, lower rl.lr, or switch dynamic sampling off"
            )

    async def _sync(self, worker: Worker) -> None:
        """The newest weights enter between two decode steps; running generations go on under them."""
        async with worker.weights:
            newest = self.ledger.version  # read now: a newer one may have come while this waited
            if worker.state != "ALIVE" or worker.settled == newest:
                return
            if await self._load(worker, newest):
                await self._probe(worker)
                worker.settled = newest
                self.room.set()

    async def _probe(self, worker: Worker) -> None:
        """What the engine says of the probes under its new weights, against what the learner said of them."""
        version, expected = self.probed
        if expected is None or worker.version != version:
            return
        try:
            scored = await self._answer(worker.actor.score_prompts.remote(self.recipe.probes))
        except (RayError, TimeoutError) as error:
            if _is_death(error):
                self._lost(worker, error)
            elif not isinstance(error, GenerationAborted):
                raise
        else:
            self.journal.probed(np.abs(np.concatenate(scored) - expected))

    async def _load(self, worker: Worker, version: Version) -> bool:
        """Bring a version into a worker; False when it died of that, or the store has yet to take the version."""
        if worker.version == version:
            return True
        try:
            newest = version == self.ledger.version  # the learner holds no other
            if not (newest and await self.broadcasts.bring(worker, version)):
                if version not in await self.store.versions.remote():
                    return False
                stored = await self.store.get.remote(version)
                await self._answer(worker.actor.update_weights.remote(version, stored), self.broadcasts.patience)
        except (RayError, TimeoutError) as error:
            if not _is_death(error):
                raise
            self._lost(worker, error)
            return False
        worker.version = version
        self.room.set()
        return True

    # --- validation --------------------------------------------------------------------------
    async def _validate(self, version: Version) -> None:
        """Greedy text for the fixed validation samples under one pinned version, ranked by the head."""
        async with self.validating:
            try:
                texts = await self._greedy(version)
                result = None if texts is None else await self._ranked(texts)
                if result is None or version.attempt != self.ledger.version.attempt:
                    return  # undone meanwhile
                record = {"step": version.number, "version": version.number, "attempt": version.attempt, **result}
                if self.journal.validated(record):
                    await self.store.save.remote(version, str(self.run.best_model), str(self.recipe.model))
                    self.journal.saved_best(record)
            finally:
                await self.store.unpin.remote(version)

    def _validates(self, number: int) -> bool:
        """Every so many versions, but for one that two others wait before: each holds its weights until then."""
        waiting = sum(task.get_name() == "_validate" for task in self.tasks)
        return number == self.config.steps or (number % self.config.rl.validate_every == 0 and waiting < 2)

    async def _greedy(self, version: Version) -> list[str] | None:
        """By the first worker that lives to the end of it; None when the version is undone meanwhile."""
        _, prompts, spec = self.recipe.validation
        while version.attempt == self.ledger.version.attempt:
            if not self.rollouts.alive:
                await asyncio.sleep(1.0)
                continue
            worker = self.rollouts.alive[0]
            async with worker.weights:
                worker.validating = True
                try:
                    if version.attempt == self.ledger.version.attempt and await self._load(worker, version):
                        rows = await self._answer(worker.actor.generate_many.remote(prompts, spec))
                        return [row[0]["text"] for row in rows]
                except (RayError, TimeoutError) as error:
                    if _is_death(error):
                        self._lost(worker, error)
                    elif not isinstance(error, GenerationAborted):
                        raise
                finally:
                    worker.validating = False
                    self._spawn(self._sync(worker))  # newer versions may have waited behind this one
                    self.room.set()
        return None

    async def _ranked(self, texts: list[str]) -> dict[str, float]:
        samples, _, _ = self.recipe.validation
        while True:
            worker = await self._idle_reward()
            worker.running = 1  # one that is to leave finishes this too
            try:
                return await asyncio.wait_for(worker.actor.validate.remote(samples, texts), self.config.reward.timeout)
            except (RayError, TimeoutError) as error:
                if not isinstance(error, TimeoutError) and not _is_death(error):
                    raise
                self._lost(worker, error)
            finally:
                worker.running = 0
                self.idle_rewards.put_nowait(worker)

    async def _idle_reward(self) -> Worker:
        while (worker := await self.idle_rewards.get()).state != "ALIVE":
            pass
        return worker

    # --- what learners call ------------------------------------------------------------------
    async def learner_starts(self) -> None:
        """Rank 0 is about to load the newest checkpoint; RuntimeError when that has led nowhere too often."""
        self._check()
        self.starts += 1
        if self.starts > 1 + MAX_RESTARTS:
            self._fail(RuntimeError(f"the learner died {MAX_RESTARTS + 1} times without reaching another checkpoint"))
            self._check()

    async def attach(self, rank: int, pid: int, node: str, committed: int) -> int:
        """A learner rank has started from the checkpoint of step `committed`; returns the attempt.

        A rank 0 that has been here before was restarted: whatever followed that checkpoint is undone.
        """
        await self.start()  # Ray has restarted this actor, or the launcher's call is under way
        self._check()
        name = f"learner-{rank}"
        former = next((one for one in self.learners if one["name"] == name), None)
        if former is not None and former["state"] == "ALIVE":
            self.journal.died("learner", name, former["pid"], former["node"], "its process ended")
        self.learners = [one for one in self.learners if one["name"] != name]
        self.learners.append({"role": "learner", "name": name, "node": node, "pid": pid, "state": "ALIVE"})
        if rank == 0 and (former is not None or committed != self.step):
            await self._forget_lost()  # a node may have gone with the learner
            self._rollback(committed)
        return self.ledger.version.attempt

    async def learner_failed(self, rank: int, pid: int, node: str, error: BaseException) -> None:
        """The last words of a rank; Ray Train starts the group anew unless nothing can come of it."""
        self.journal.died("learner", f"learner-{rank}", pid, node, last_words(error))
        self.learners = [{**one, "state": "DEAD"} if one["pid"] == pid else one for one in self.learners]
        if isinstance(error, ConfigError):
            self._fail(error)

    async def attached(self) -> None:
        """Rank 0 has published the weights that it started from."""
        self.weights_due.set()

    async def next_batch(self, step: int, attempt: int) -> Batch | None:
        """The groups of `step` for every rank alike; None when the training is over or is to stop."""
        self._check(attempt)
        return await asyncio.shield(self._batch(step))

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
            self._spawn(self._stored(one))
        self.probed = (version, probed)
        loads = self._mean_loads()
        metrics = {**metrics, "loads": loads}
        self.journal.step(metrics, list(self.metas), self.ledger.counts()["DROPPED"], len(self.rewards.alive))
        self._autoscale(metrics["seconds"], loads)
        self.batches.pop(step - 1, None)
        self.step = step + 1
        self.ledger.published(version)
        for event in (self.stepped_on, self.weights_due, self.room, self.scored):
            event.set()

    async def _stored(self, reference: Any) -> None:
        with contextlib.suppress(RayError):  # the learner's failure too, and it says why
            await reference
        self.weights_due.set()

    async def next_order(self, attempt: int, answer: Answer | None) -> Order | None:
        """Which worker rank 0 is to send its weights to next; None when no more follow."""
        self._check(attempt)
        return await self.broadcasts.next(attempt, answer)

    async def commit(self, step: int, attempt: int) -> None:
        """All ranks have written their part of the checkpoint: add the ledger and make it the newest."""
        self._check(attempt)
        try:
            snapshot, payloads = await self._snapshot(step)
        except ObjectLostError:
            await self._forget_lost()
            snapshot, payloads = await self._snapshot(step)
        await asyncio.to_thread(checkpoints.add_ledger, self.run, self.config, step, snapshot, payloads)
        self._check(attempt)  # not undone meanwhile
        checkpoints.commit(self.run, step)
        self.ledger.committed(step)
        self.starts = 1

    # --- what the launcher calls -------------------------------------------------------------
    async def status(self) -> dict[str, Any]:
        return self._status()

    async def weight_store(self) -> Any:
        return self.store

    async def scale(self, role: str, count: int) -> list[dict[str, Any]]:
        """Have `count` workers of a role from now on; those that leave finish what they hold. Returns who there is."""
        workers = self._workers(role)
        workers.wanted = count
        taken = {worker.place for worker in workers.left}
        for place in sorted(set(range(count)) - taken):
            self._spawn(self._replace(workers, place))
        for worker in workers.left:
            if worker.place >= count:
                self._spawn(self._retire(workers, worker))
        return workers.describe()

    async def interrupt(self) -> None:
        """Take no further step: the learners get None, write a checkpoint and leave."""
        self.interrupted = True
        self._write_status()  # a controller that is started anew is to know
        self.scored.set()

    async def stop(self) -> None:
        """Wait for validations under way, write the last status, end the workers."""
        if self.failure is None and not self.interrupted:
            due = [task for task in self.tasks if task.get_name() == "_validate"]
            await asyncio.gather(*due, return_exceptions=True)
        if self.failure is None:
            self.state = "FINISHED" if self.step >= self.config.steps else "STOPPED"
        if self.main is not None:
            self.main.cancel()
            with contextlib.suppress(BaseException):
                await self.main
        for task in list(self.tasks):
            task.cancel()
        self.ledger.cancel()
        await asyncio.gather(self.rollouts.measure(), self.rewards.measure())
        self.broadcasts.end(self.ledger.version.attempt)
        self.rollouts.stop()
        self.rewards.stop()
        self.learners = [{**one, "state": "STOPPED"} for one in self.learners]
        self._write_status()

    # --- inside ------------------------------------------------------------------------------
    def _open_ledger(self) -> Ledger:
        """A new ledger, or that of the newest checkpoint when the run is resumed."""
        settings: dict[str, Any] = {
            "max_staleness": self.config.max_staleness,
            "groups_per_step": self.config.groups_per_step,
            "max_tries": self.config.rl.max_tries,
        }
        checkpoint, earlier = checkpoints.newest(self.run), self.journal.status()
        attempt = earlier.get("attempt", -1) + 1  # never one that was used, for late messages go by it
        if checkpoint is None:
            self.journal.cut(0)
            return Ledger(version=Version(attempt, 0), **settings)
        self.journal.best = read_json(self.run.folder / "best.json", {})
        self.earlier_cpu = earlier.get("cpu_seconds", 0.0)
        step, snapshot, rows = checkpoints.read_ledger(checkpoint)
        payloads = {number: self.placement.put(group) for number, group in rows.items()}
        ledger = Ledger.restore(snapshot, payloads, **settings)
        ledger.rollback(Version(max(attempt, ledger.version.attempt + 1), step), step)
        self.journal.cut(step)
        return ledger

    def _remember(self) -> None:
        """Ray has restarted this actor after its process died: what was told must not be told again."""
        earlier = self.journal.status()
        self.journal.deaths.extend(earlier.get("deaths", []))
        self.interrupted = earlier.get("interrupted", False)
        me = next((actor for actor in earlier.get("actors", []) if actor["role"] == "controller"), None)
        if me is not None:
            self.journal.died("controller", "controller", me["pid"], me["node"], "its process ended")

    def _workers(self, role: str) -> Workers:
        return {"rollout": self.rollouts, "reward": self.rewards}[role]

    def _start_rollout(self, name: str, place: int) -> Any:
        return self.placement.rollout(self.run, self.config, self.recipe, name, place)

    def _start_reward(self, name: str, place: int) -> Any:
        return self.placement.reward(self.run, self.config, name)

    async def _add(self, workers: Workers, place: int) -> None:
        worker = await workers.add(place)
        if workers is self.rewards:
            self.idle_rewards.put_nowait(worker)
        else:
            await self._sync(worker)
            self.room.set()

    async def _replace(self, workers: Workers, place: int) -> None:
        """A new worker in the place of a dead one, tried for ever while others live; else the run ends."""
        for tries in itertools.count(1):
            await asyncio.sleep(REPLACEMENT_PAUSES[min(tries, len(REPLACEMENT_PAUSES)) - 1])
            if place >= workers.wanted:
                return  # scaled down meanwhile
            try:
                return await self._add(workers, place)
            except EngineError as error:
                if place < workers.wanted:
                    self.journal.died(workers.role, f"{workers.role} in place {place}", 0, "", last_words(error))
                if tries >= len(REPLACEMENT_PAUSES) and not workers.left:
                    raise

    async def _retire(self, workers: Workers, worker: Worker) -> None:
        if worker.state == "STARTING":
            workers.bury(worker)
        else:
            await workers.retire(worker)

    def _mean_loads(self) -> dict[str, float]:
        """Of each role since the last learner step; {} when no heartbeat fell between."""
        loads = {role: fmean(load[role] for load in self.loads) for role in (self.loads or [{}])[0]}
        self.loads.clear()
        return loads

    def _autoscale(self, seconds: dict[str, float], loads: dict[str, float]) -> None:
        """Workers come and go with what waited in the learner step that took `seconds`."""
        if not loads:
            return
        self.scaler.observe(seconds["wait"] / max(seconds["total"], 1e-9), loads)
        for role, count in self.scaler.wanted({role: self._workers(role).wanted for role in loads}).items():
            if count != self._workers(role).wanted:
                self._spawn(self._scaled(role, count))

    async def _scaled(self, role: str, count: int) -> None:
        await self.scale(role, count)

    async def _abort(self, worker: Worker) -> None:
        """Stop what runs under weights that are undone."""
        try:
            await self._answer(worker.actor.abort_all.remote())
        except (RayError, TimeoutError) as error:
            self._lost(worker, error)

    async def _next_groups(self) -> list[Group] | None:
        """As soon as enough are READY; None when no step is to follow."""
        while self._more_steps():
            if groups := self.ledger.take_step():
                return groups
            self.room.set()  # what was dropped as stale leaves room
            await _signal(self.scored)
        return None

    def _more_steps(self) -> bool:
        return self.step < self.config.steps and not self.interrupted

    def _moment(self) -> tuple[int, int, bool]:
        return self.ledger.version.attempt, self.step, self._more_steps()

    def _wanted(self) -> bool:
        """Whether the steps that are left need another group."""
        dropped = sum(self.ledger.counts()["DROPPED"].values())
        return self.ledger.admitted - dropped < self.config.steps * self.config.groups_per_step

    def _may_lease(self, worker: Worker) -> bool:
        """Not to a worker whose tokens would be too old, or of an undone attempt, when they are consumed."""
        fresh = worker.version.attempt == self.ledger.version.attempt and self.ledger.admits(worker.version.number)
        return fresh and not worker.validating and worker.running < worker.slots

    def _failed(self, group: Group, error: BaseException) -> Group | None:
        """One try went wrong. A group that used up its tries is dropped; many in a row end the run."""
        cause = getattr(error, "cause", error)
        if isinstance(cause, ConfigError):
            raise cause
        after = self.ledger.failed(group, last_words(error))
        if after is not None and after.state == "DROPPED":
            self.suspects.discard(group.id)
            self.in_a_row["poisoned"] += 1
            if self.in_a_row["poisoned"] >= POISONED_IN_A_ROW:
                raise RuntimeError(
                    f"{POISONED_IN_A_ROW} groups in a row failed, {self.ledger.max_tries} times each; "
                    f"the last with {last_words(error)}"
                )
        return after

    def _lost(self, worker: Worker, error: BaseException) -> None:
        """A worker died: its groups go back to PENDING, another takes its place, and the run goes on."""
        if worker.state not in ("ALIVE", "LEAVING"):
            return
        workers = self.rollouts if worker.name.startswith(self.rollouts.role) else self.rewards
        workers.bury(worker)
        self.journal.died(workers.role, worker.name, worker.pid, worker.node, last_words(error))
        self.ledger.worker_lost(worker.name)
        self.in_a_row[workers.role] += 1
        if self.in_a_row[workers.role] >= LOST_IN_A_ROW * workers.wanted:
            raise RuntimeError(
                f"{self.in_a_row[workers.role]} {workers.role} workers in a row died: {last_words(error)}"
            )
        if worker.place < workers.wanted:
            self._spawn(self._replace(workers, worker.place))
        self._spawn(self._forget_lost())  # it may have gone with its whole node
        self.room.set()

    async def _snapshot(self, step: int) -> tuple[dict[str, Any], list[Any]]:
        """What the ledger knows, and the rows of the groups that it lists."""
        snapshot = self.ledger.snapshot(step)
        held = [self.ledger.group(number) for number in snapshot["payload_ids"]]
        return snapshot, await asyncio.gather(*(group.payload for group in held if group is not None))

    async def _forget_lost(self) -> None:
        """Groups whose rows were on a node that is gone are written anew; a fetch is the only way to know."""

        async def lost(group: Group) -> bool:
            try:
                await group.payload
            except ObjectLostError:
                return True
            return False

        held = self.ledger.held()
        for group, gone in zip(held, await asyncio.gather(*map(lost, held)), strict=True):
            if gone:
                self.ledger.payload_lost(group)
        self.room.set()

    def _rollback(self, committed: int) -> None:
        """The learner came back from an older checkpoint: later steps are undone."""
        attempt = self.ledger.version.attempt + 1
        self.broadcasts.end(attempt - 1)
        self.ledger.rollback(Version(attempt, committed), committed)
        self.step = committed
        for future in self.batches.values():
            future.cancel()
        self.batches.clear()
        for worker in self.rollouts.alive:
            self._spawn(self._abort(worker))
        self.journal.cut(committed)
        for event in (self.stepped_on, self.scored, self.room):
            event.set()

    def _batch(self, step: int) -> asyncio.Future[Batch | None]:
        if step not in self.batches:
            self.batches[step] = asyncio.get_running_loop().create_future()
        return self.batches[step]

    def _give(self, batch: Batch | None) -> None:
        future = self._batch(self.step)
        if not future.done():
            future.set_result(batch)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task:
        """Run `work` beside the loop; an exception in it ends the loop."""
        task = asyncio.get_running_loop().create_task(work, name=work.__name__)
        self.tasks.add(task)
        task.add_done_callback(self._reap)
        return task

    def _reap(self, task: asyncio.Task) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
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
        for future in self.batches.values():
            if not future.done():
                future.set_exception(RuntimeError(f"the controller failed: {self.failure}"))
        for task in self.tasks:
            task.cancel()
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
            "step": self.step,
            "steps": self.config.steps,
            "version": self.ledger.version.number,
            "attempt": self.ledger.version.attempt,
            "groups": self.ledger.counts(),
            "admitted": self.ledger.admitted,
            "returned": dict(self.ledger.events),
            "actors": [{**me, "state": state}, *self.rollouts.describe(), *self.rewards.describe(), *self.learners],
            "last_step": self.journal.last_step,
            "best": self.journal.best,
            "cpu_seconds": self.earlier_cpu + self.rollouts.cpu_seconds + self.rewards.cpu_seconds + learner_cpu,
            "deaths": list(self.journal.deaths),
            "notices": list(self.journal.notices),
            "failure": self.failure,
            "interrupted": self.interrupted,
            "time": time.time(),
        }

    def _write_status(self) -> None:
        self.journal.write_status(self._status())


def _is_death(error: BaseException) -> bool:
    """Whether the worker is gone, or its engine in it: a task error is else the fault of what it was given."""
    if isinstance(error, RayTaskError):
        return isinstance(error.cause, EngineError) and not isinstance(error.cause, GenerationAborted)
    return True


async def _signal(event: asyncio.Event) -> None:
    await event.wait()
    event.clear()
