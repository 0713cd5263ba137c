"""The controller: the asynchronous loop of stage 2 on one screen.

`produce` leases prompts to rollout workers, `score` sends what they wrote to reward workers, `train`
hands finished groups to the learners, `publish` brings their new weights to the rollout workers,
`validate` watches what became of the policy. They share one `Ledger`, which alone decides what may be
leased, consumed or dropped; the controller holds references, never tensors. Payloads are method
return values, so the controller owns them and a dead worker takes none along.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import time
from collections import Counter, deque
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from actors.cluster import Cluster, core, last_words
from actors.reward import RewardWorker, reward_options
from actors.rollout import RolloutWorker, rollout_options
from actors.weight_store import WeightStore
from rporec.config import Config
from rporec.engine.types import FIRST_VERSION, EngineError, Version
from rporec.files import append_line, read_json, read_lines, replacing, write_json
from rporec.recipes import load_recipe
from rporec.report.tensorboard import Scalars
from rporec.rl.ledger import Group, Ledger
from rporec.rl.rollout_schema import GroupMeta, Lease
from rporec.run import Run

# Groups that one reward call may hold: enough to batch, few enough to return within a second.
REWARD_BATCH = 32


@dataclass
class Worker:
    """A rollout or reward worker as the controller sees it."""

    name: str
    actor: Any
    slots: int  # groups it may hold at once
    running: int = 0
    pid: int = 0
    node: str = ""
    started_at: float = 0.0  # CPU seconds that its start took
    state: str = "STARTING"
    version: Version = FIRST_VERSION  # of the weights that it has
    validating: bool = False  # no leases: what they sampled would grow stale behind the pinned version
    # Held while weights enter or a validation is being written: a validation has one version.
    weights: asyncio.Lock = field(default_factory=asyncio.Lock)


@dataclass(frozen=True)
class Batch:
    """One learner step's groups, in the order in which they are consumed."""

    step: int
    version: Version
    payloads: tuple[Any, ...]  # references to record batches


@ray.remote(num_cpus=0, max_concurrency=1000)
class Controller:
    def __init__(self, run: Run, config: Config, cluster: Cluster) -> None:
        self.run, self.config, self.cluster = run, config, cluster
        self.best: dict[str, Any] = {}
        self.recipe = load_recipe(run, config)
        self.prompts = self.recipe.rl_prompts()
        self.ledger = self._open_ledger()
        self.board = Scalars(run.folder / "tensorboard")
        self.store: Any = None
        self.rollouts: list[Worker] = []
        self.rewards: list[Worker] = []
        self.step = self.ledger.step  # the learner's next one
        self.state = "STARTING"
        self.learners: list[dict[str, Any]] = []
        self.last_step: dict[str, Any] = {}
        self.room = asyncio.Event()  # a lease may have become possible
        self.scored = asyncio.Event()  # a group may have become READY
        self.stepped_on = asyncio.Event()  # the learner has finished a step
        self.weights_due = asyncio.Event()  # the store holds a version that workers lack
        self.written: asyncio.Queue[Group] = asyncio.Queue()
        self.idle_rewards: asyncio.Queue[Worker] = asyncio.Queue()
        self.batches: dict[int, asyncio.Future[Batch | None]] = {}
        self.metas: deque[GroupMeta] = deque(maxlen=4 * config.groups_per_step)
        self.window = Counter[str]()  # what happened since the last learner step
        self.reward_seconds = 0.0
        self.stepped = time.monotonic()
        self.tasks: set[asyncio.Task] = set()
        self.main: asyncio.Task | None = None
        self.failure: str | None = None
        self.cpu_seconds: float | None = None  # known when the training is over

    # --- the loop ----------------------------------------------------------------------------
    async def start(self) -> None:
        """Bring up the workers and begin; returns when every one of them is ready."""
        self.store = WeightStore.options(num_cpus=0).remote()
        count = self.config.rollout_workers
        await asyncio.gather(
            *(self._add_rollout(index) for index in range(count)),
            *(self._add_reward(index) for index in range(self.config.reward_workers)),
        )
        self.state = "RUNNING"
        self.main = asyncio.create_task(self._loop())

    async def _loop(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for part in (self.produce, self.score, self.train, self.publish, self.heartbeat):
                    group.create_task(part(), name=part.__name__)
        except* Exception as errors:
            self._fail("; ".join(f"{type(error).__name__}: {error}" for error in errors.exceptions))

    async def produce(self) -> None:
        """Admit prompts while the ledger has capacity; lease them to workers with free slots."""
        while True:
            while self.ledger.capacity() > 0 and self._wanted():
                self.ledger.admit(*self.recipe.draw(self.ledger.admitted))
            for worker in sorted(self.rollouts, key=lambda worker: worker.running):
                while self._may_lease(worker):
                    if (group := self.ledger.lease(worker.name)) is None:
                        break
                    worker.running += 1
                    self._spawn(self._generate(worker, group))
            await _signal(self.room)

    async def score(self) -> None:
        """Send what has been written to idle reward workers, as much at a time as has piled up."""
        while True:
            groups = [await self.written.get()]
            worker = await self.idle_rewards.get()
            while not self.written.empty() and len(groups) < REWARD_BATCH:
                groups.append(self.written.get_nowait())
            self._spawn(self._reward(worker, groups))

    async def train(self) -> None:
        """Give each learner step its groups: oldest version first, none beyond the staleness bound."""
        while self.step < self.config.steps:
            while (groups := self.ledger.take_step()) is None:
                self.room.set()  # what was dropped as stale leaves room
                await _signal(self.scored)
            step = self.step  # read now: a rollback may have come while this waited
            self.metas.extend(group.meta for group in groups if group.meta is not None)
            self._batch(step).set_result(Batch(step, self.ledger.version, tuple(group.payload for group in groups)))
            while self.step == step:
                await _signal(self.stepped_on)
        self._batch(self.config.steps).set_result(None)

    async def publish(self) -> None:
        """Bring each new version to every rollout worker; validate the versions that are due."""
        newest: Version | None = None
        while True:
            await _signal(self.weights_due)
            if newest == self.ledger.version:
                continue
            newest = self.ledger.version
            due = newest.number % self.config.rl.validate_every == 0 or newest.number == self.config.steps
            if due:
                await self.store.pin.remote(newest)  # until it is validated, however many follow it
            for index, worker in enumerate(w for w in self.rollouts if w.state == "ALIVE"):
                self._spawn(self._sync(worker, newest, validate=due and index == 0))

    async def heartbeat(self) -> None:
        while True:
            self._write_status()
            await asyncio.sleep(1.0)

    # --- one group, one worker ---------------------------------------------------------------
    async def _generate(self, worker: Worker, group: Group) -> None:
        lease = Lease(group.id, group.sample, self.prompts[group.sample], group.seed)
        payload, meta = worker.actor.generate.remote(lease, self.recipe.rollout_spec(lease.seed))
        try:
            described: GroupMeta = await meta
        except RayTaskError as error:
            self.ledger.failed(group, last_words(error))
        except RayError as error:
            self._lost(worker, error)
        else:
            if generated := self.ledger.generated(group, payload, described):
                self.window["tokens"] += described.tokens
                self.written.put_nowait(generated)
        finally:
            worker.running -= 1
            self.room.set()

    async def _reward(self, worker: Worker, groups: list[Group]) -> None:
        began = time.monotonic()
        *scored, report = worker.actor.score.options(num_returns=len(groups) + 1).remote(
            *(group.payload for group in groups)
        )
        try:
            metas: list[GroupMeta] = await asyncio.wait_for(report, self.config.reward.timeout)
        except RayTaskError as error:
            for group in groups:
                self.ledger.failed(group, last_words(error))
        except (RayError, TimeoutError) as error:
            self._lost(worker, error)
            for group in groups:
                self.written.put_nowait(group)
        else:
            for group, payload, meta in zip(groups, scored, metas, strict=True):
                if (judged := self.ledger.scored(group, payload, meta)) is None:
                    continue
                self.window["flat"] += meta.flat
                self.window["scored"] += 1
                if meta.flat and self.config.rl.dynamic_sampling:
                    self.ledger.drop(judged, "flat")
                else:
                    self.ledger.ready(judged)
        finally:
            self.reward_seconds += time.monotonic() - began
            if worker.state == "ALIVE":
                self.idle_rewards.put_nowait(worker)
            self.scored.set()
            self.room.set()

    async def _sync(self, worker: Worker, version: Version, *, validate: bool) -> None:
        """New weights enter between two decode steps; running generations go on under them."""
        async with worker.weights:
            if version < self.ledger.version and not validate:
                return  # a newer version has come while this one waited
            worker.validating = validate
            try:
                await worker.actor.update_weights.remote(version, await self.store.get.remote(version))
                worker.version = version
                self.room.set()
                if validate:
                    await self._validate(worker, version)
            except RayTaskError:
                raise
            except RayError as error:
                self._lost(worker, error)
            finally:
                worker.validating = False
                self.room.set()
                if validate:
                    await self.store.unpin.remote(version)

    async def _validate(self, worker: Worker, version: Version) -> None:
        """Greedy decoding for the fixed validation users under one pinned version."""
        samples, prompts, spec = self.recipe.validation()
        texts = await worker.actor.generate_many.remote(prompts, spec)
        judge = next(judge for judge in self.rewards if judge.state == "ALIVE")
        result = await judge.actor.validate.remote(samples, [row[0]["text"] for row in texts])
        record = {"step": version.number, "version": version.number, "attempt": version.attempt, **result}
        append_line(self.run.validation, record)
        self.board.write(version.number, {"validation": result})
        if not self.best or record["ndcg@10"] > self.best["ndcg@10"]:
            await self.store.save.remote(version, str(self.run.best_model), str(self.recipe.model))
            self.best = record
            write_json(self.run.folder / "best.json", record)

    # --- what learners call ------------------------------------------------------------------
    async def attach(self, rank: int, pid: int, node: str, committed: int) -> int:
        """A learner rank has started from the checkpoint of step `committed`; returns the attempt."""
        self.learners = [one for one in self.learners if one["name"] != f"learner-{rank}"]
        self.learners.append({"role": "learner", "name": f"learner-{rank}", "node": node, "pid": pid, "state": "ALIVE"})
        self._check()
        if rank == 0 and committed != self.step:
            self._rollback(committed)
        return self.ledger.version.attempt

    async def attached(self) -> None:
        """Rank 0 has published the weights that it started from."""
        self.weights_due.set()

    async def next_batch(self, step: int) -> Batch | None:
        """The groups of `step` for every rank alike; None when the training is over."""
        self._check()
        return await asyncio.shield(self._batch(step))

    async def finished_step(self, step: int, version: Version, metrics: dict[str, Any]) -> None:
        """Rank 0 has published `version`, made by `step`; what it measured goes into steps.jsonl."""
        self._write_step(step, metrics)
        self.batches.pop(step - 1, None)
        self.step = step + 1
        self.ledger.published(version)
        for event in (self.stepped_on, self.weights_due, self.room, self.scored):
            event.set()

    async def commit(self, step: int) -> None:
        """All ranks have written `step_N.tmp`: add what the controller knows and make it the newest."""
        folder = self.run.checkpoints / f"step_{step}"
        partial = folder.with_name(folder.name + ".tmp")
        write_json(partial / "controller.json", {"step": step, "ledger": self.ledger.snapshot(step), "best": self.best})
        os.replace(partial, folder)
        self.ledger.committed(step)
        for old in committed_steps(self.run)[:-2]:
            shutil.rmtree(self.run.checkpoints / f"step_{old}")

    # --- what the launcher calls -------------------------------------------------------------
    async def status(self) -> dict[str, Any]:
        return self._status()

    async def weight_store(self) -> Any:
        return self.store

    async def stop(self) -> None:
        """Wait for validations under way, write the last status, end the workers."""
        if self.failure is None:
            await asyncio.gather(*[task for task in self.tasks if task.get_name() == "_sync"], return_exceptions=True)
            self.state = "FINISHED" if self.step >= self.config.steps else "STOPPED"
        if self.main is not None:
            self.main.cancel()
            with contextlib.suppress(BaseException):
                await self.main
        for task in list(self.tasks):
            task.cancel()
        self.ledger.cancel()
        self.cpu_seconds = await self._cpu_seconds()
        for worker in (*self.rollouts, *self.rewards):
            worker.state = "STOPPED"
            ray.kill(worker.actor)
        self._write_status()

    # --- inside ------------------------------------------------------------------------------
    def _open_ledger(self) -> Ledger:
        """A new ledger, or that of the newest checkpoint when the run is resumed."""
        settings: dict[str, Any] = {
            "max_staleness": self.config.max_staleness,
            "groups_per_step": self.config.groups_per_step,
            "max_tries": self.config.rl.max_tries,
        }
        checkpoint = newest_checkpoint(self.run)
        if checkpoint is None:
            self._cut_steps(0)
            return Ledger(**settings)
        state = read_json(checkpoint / "controller.json")
        self.best = state["best"]
        ledger = Ledger.restore(state["ledger"], {}, **settings)
        ledger.rollback(Version(ledger.version.attempt + 1, state["step"]), state["step"])
        self._cut_steps(state["step"])
        return ledger

    async def _add_rollout(self, index: int) -> None:
        name = f"rollout-{index}"
        options = rollout_options(self.config.engine, self.cluster.cuda)
        actor = RolloutWorker.options(name=name, **options).remote(
            name=name,
            model=str(self.recipe.model),
            engine=self.config.engine,
            context=self.recipe.context,
            seed=self.config.seed + index,
            cpu_core=None if self.cluster.cuda else core(index),
        )
        slots = max(1, self.config.engine.max_num_seqs // self.config.group_size)
        worker = Worker(name, actor, slots)
        self.rollouts.append(worker)
        await self._ready(worker)
        self.room.set()

    async def _add_reward(self, index: int) -> None:
        name = f"reward-{index}"
        actor = RewardWorker.options(name=name, **reward_options(self.cluster)).remote(self.run, self.config)
        worker = Worker(name, actor, slots=1)
        self.rewards.append(worker)
        await self._ready(worker)
        self.idle_rewards.put_nowait(worker)

    async def _ready(self, worker: Worker) -> None:
        try:
            status = await worker.actor.status.remote()
        except RayActorError as error:
            raise EngineError(f"{worker.name} did not start: {last_words(error)}") from None
        worker.pid, worker.node, worker.state = status["pid"], status["node"], "ALIVE"
        worker.started_at = status["cpu_seconds"]

    async def _abort(self, worker: Worker) -> None:
        """Stop what runs under weights that are undone."""
        try:
            await worker.actor.abort_all.remote()
        except RayError as error:
            self._lost(worker, error)

    def _wanted(self) -> bool:
        """Whether the steps that are left need another group."""
        dropped = sum(self.ledger.counts()["DROPPED"].values())
        return self.ledger.admitted - dropped < self.config.steps * self.config.groups_per_step

    def _may_lease(self, worker: Worker) -> bool:
        """Not to a worker whose tokens would be too old, or of an undone attempt, when they come back."""
        ours, newest = worker.version, self.ledger.version
        fresh = ours.attempt == newest.attempt and ours.number >= newest.number - self.config.max_staleness
        return worker.state == "ALIVE" and fresh and not worker.validating and worker.running < worker.slots

    def _lost(self, worker: Worker, error: BaseException) -> None:
        """A worker died: its groups go back to PENDING, and the run goes on with the others."""
        if worker.state == "DEAD":
            return
        worker.state = "DEAD"
        ray.kill(worker.actor)  # one that hangs may not come back with late results
        print(f"{worker.name} on node {worker.node} died: {last_words(error)}", flush=True)
        self.ledger.worker_lost(worker.name)
        if not any(w.state != "DEAD" for w in (self.rollouts if worker in self.rollouts else self.rewards)):
            raise RuntimeError(f"the last {worker.name.split('-')[0]} worker died: {last_words(error)}")
        self.room.set()

    def _rollback(self, committed: int) -> None:
        """The learner came back from an older checkpoint: later steps are undone."""
        attempt = self.ledger.version.attempt + 1
        self.ledger.rollback(Version(attempt, committed), committed)
        self.step = committed
        for future in self.batches.values():
            future.cancel()
        self.batches.clear()
        for worker in self.rollouts:
            if worker.state == "ALIVE":
                self._spawn(self._abort(worker))
        self.stepped_on.set()
        self._cut_steps(committed)
        self.scored.set()
        self.room.set()

    def _cut_steps(self, step: int) -> None:
        """Forget what was logged of steps that are undone: each step stands in the file once."""
        for path in (self.run.steps, self.run.validation):
            kept = [record for record in read_lines(path) if record["step"] < step]
            with replacing(path) as temporary:
                temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))

    def _batch(self, step: int) -> asyncio.Future[Batch | None]:
        if step not in self.batches:
            self.batches[step] = asyncio.get_running_loop().create_future()
        return self.batches[step]

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` beside the loop; an exception in it ends the loop."""
        task = asyncio.get_running_loop().create_task(work, name=work.__name__)
        self.tasks.add(task)
        task.add_done_callback(self._reap)

    def _reap(self, task: asyncio.Task) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(f"{task.get_name()}: {last_words(error)}")
            if self.main is not None:
                self.main.cancel()

    def _fail(self, reason: str) -> None:
        """Whoever waits for the loop must hear of its end."""
        self.failure = self.failure or reason
        self.state = "FAILED"
        for future in self.batches.values():
            if not future.done():
                future.set_exception(RuntimeError(f"the controller failed: {self.failure}"))
        self._write_status()

    def _check(self) -> None:
        if self.failure is not None:
            raise RuntimeError(f"the controller failed: {self.failure}")

    # --- what a person sees ------------------------------------------------------------------
    async def _cpu_seconds(self) -> float:
        """What rollout, reward and learner processes have computed for, their starts apart."""
        alive = [worker for worker in (*self.rollouts, *self.rewards) if worker.state == "ALIVE"]
        answers = await asyncio.gather(*(worker.actor.status.remote() for worker in alive), return_exceptions=True)
        spent = [
            answer["cpu_seconds"] - worker.started_at
            for worker, answer in zip(alive, answers, strict=True)
            if isinstance(answer, dict)
        ]
        return sum(spent) + self.last_step.get("cpu_seconds", 0.0) * self.config.learners

    def _write_step(self, step: int, metrics: dict[str, Any]) -> None:
        metas = list(self.metas)[-self.config.groups_per_step :]
        now = time.monotonic()
        elapsed, self.stepped = now - self.stepped, now
        gaming = _mean_of([meta.gaming for meta in metas])
        gaming["flat_groups"] = self.window["flat"] / max(1, self.window["scored"])
        self.last_step = {
            **metrics,
            "format": sum(meta.format for meta in metas) / max(1, len(metas)),
            "tokens_per_second": round(self.window["tokens"] / elapsed, 1),
            "reward_worker_busy": round(self.reward_seconds / elapsed / max(1, len(self.rewards)), 4),
            "dropped": self.ledger.counts()["DROPPED"],
            "gaming": gaming,
        }
        self.window.clear()
        self.reward_seconds = 0.0
        append_line(self.run.steps, self.last_step)
        self.board.write(step, self.last_step)

    def _status(self) -> dict[str, Any]:
        actors = [
            {"role": role, "name": worker.name, "node": worker.node, "pid": worker.pid, "state": worker.state}
            for role, workers in (("rollout", self.rollouts), ("reward", self.rewards))
            for worker in workers
        ]
        node = ray.get_runtime_context().get_node_id()
        me = {"role": "controller", "name": "controller", "node": node, "pid": os.getpid(), "state": "ALIVE"}
        return {
            "state": self.state,
            "step": self.step,
            "steps": self.config.steps,
            "version": self.ledger.version.number,
            "attempt": self.ledger.version.attempt,
            "groups": self.ledger.counts(),
            "actors": [me, *actors, *self.learners],
            "last_step": self.last_step,
            "best": self.best,
            "cpu_seconds": self.cpu_seconds,
            "failure": self.failure,
            "time": time.time(),
        }

    def _write_status(self) -> None:
        write_json(self.run.folder / "status.json", self._status())


def committed_steps(run: Run) -> list[int]:
    """Steps of the committed checkpoints, oldest first."""
    names = [path.name for path in run.checkpoints.glob("step_*") if not path.name.endswith(".tmp")]
    return sorted(int(name.removeprefix("step_")) for name in names)


def newest_checkpoint(run: Run) -> Path | None:
    steps = committed_steps(run)
    return run.checkpoints / f"step_{steps[-1]}" if steps else None


async def _signal(event: asyncio.Event) -> None:
    await event.wait()
    event.clear()


def _mean_of(records: list[Any]) -> dict[str, float]:
    keys = {key for record in records for key in record}
    return {key: sum(r[key] for r in records if key in r) / sum(key in r for r in records) for key in sorted(keys)}
