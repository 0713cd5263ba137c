"""The controller without the machine: rollout, reward and learner as coroutines that only take time.

They stand behind the same calls as the Ray actors, so that the real controller, ledger and checkpoints
can be driven to hundreds of workers in one process, be killed at any moment, and be measured. On a
`VirtualClock` a simulated hour takes seconds and repeats exactly.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine, Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
from ray.exceptions import ActorDiedError

from actors import checkpoints
from actors.controller import Controller
from actors.steps import Batch
from rporec.config import Config
from rporec.engine.types import FIRST_VERSION, Generated, SamplingSpec, Spec, Version
from rporec.rl.rollout_schema import GroupMeta, Lease, rollout_batch
from rporec.run import Run

TOKENS = 32  # of a simulated completion


class VirtualClock(asyncio.SelectorEventLoop):
    """An event loop whose time leaps to the next timer whenever nothing else is left to do."""

    def __init__(self) -> None:
        self._now = 0.0
        super().__init__(_Leaping(self))

    def time(self) -> float:
        return self._now

    def leap(self, seconds: float) -> None:
        self._now += seconds

    def run_in_executor(self, executor: Any, function: Callable[..., Any], *arguments: Any) -> asyncio.Future:  # type: ignore[override]
        """At once: a thread would take real time, in which simulated time leaps on."""
        future = self.create_future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


class _Leaping(selectors.DefaultSelector):
    """Leaps over the wait for a timer."""

    def __init__(self, clock: VirtualClock) -> None:
        super().__init__()
        self.clock = clock

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(timeout if timeout is None else 0)
        if not ready and timeout:
            self.clock.leap(timeout)
        return ready


@dataclass(frozen=True)
class Latency:
    """Seconds of one call: constant with `sigma` 0, else log-normal with that mean; or drawn from `recorded`."""

    mean: float = 0.0
    sigma: float = 0.0
    recorded: tuple[float, ...] = ()

    def draw(self, rng: np.random.Generator) -> float:
        if self.recorded:
            return float(rng.choice(self.recorded))
        if not self.sigma:
            return self.mean
        return float(self.mean * np.exp(rng.normal(-(self.sigma**2) / 2, self.sigma)))


@dataclass(eq=False)
class Rows:
    """What stands for an object reference: await it for the rows of one group, made only then."""

    make: Callable[[], pa.RecordBatch]
    meta: GroupMeta | None = None  # once generated

    def __await__(self) -> Generator[Any, None, pa.RecordBatch]:
        yield from asyncio.sleep(0).__await__()
        return self.make()


class Handle:
    """Calls an object as Ray calls an actor: `handle.method.remote(…)`."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def __getattr__(self, name: str) -> _Method:
        return _Method(getattr(self.target, name))


@dataclass(frozen=True)
class _Method:
    call: Callable[..., Any]

    def remote(self, *arguments: Any) -> Any:
        return self.call(*arguments)

    def options(self, **_: Any) -> _Method:
        return self


class _Actor:
    """Answers after a while, unless it was killed before."""

    def __init__(self, name: str, start: float) -> None:
        self.name, self.start = name, start
        self.dead = False
        self.open: set[asyncio.Future] = set()

    def answer(self, seconds: float, value: Callable[[], Any]) -> asyncio.Future:
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        if self.dead:
            future.set_exception(ActorDiedError())
            return future
        self.open.add(future)

        def finish() -> None:
            self.open.discard(future)
            if not future.done():
                future.set_result(value())

        if seconds:
            loop.call_later(seconds, finish)
        else:
            loop.call_soon(finish)
        return future

    def die(self) -> None:
        self.dead = True
        for future in self.open:
            if not future.done():
                future.set_exception(ActorDiedError())
        self.open.clear()

    def status(self) -> asyncio.Future:
        seconds, self.start = self.start, 0.0
        return self.answer(seconds, lambda: {"pid": 0, "node": "simulated", "cpu_seconds": 0.0})


class SimulatedRollout(_Actor):
    """Each group takes its own time, however many run at once; tokens know the versions that came by."""

    def __init__(self, name: str, start: float, latency: Latency, rng: np.random.Generator, size: int) -> None:
        super().__init__(name, start)
        self.latency, self.rng, self.size = latency, rng, size
        self.version = FIRST_VERSION
        self.busy = 0.0  # seconds of generation that were asked for

    def generate(self, lease: Lease, spec: Spec) -> tuple[Rows, asyncio.Future]:
        first, seconds = self.version, self.latency.draw(self.rng)
        self.busy += seconds

        rows = Rows(lambda: _rows(lease, rows.meta))

        def finish() -> GroupMeta:
            versions = tuple(sorted({first, self.version}))
            rows.meta = GroupMeta(lease.group, TOKENS * self.size, (TOKENS,) * self.size, versions, 1.0)
            return rows.meta

        return rows, self.write(seconds, finish)

    def write(self, seconds: float, value: Callable[[], Any]) -> asyncio.Future:
        return self.answer(seconds, value)

    def generate_together(self, leases: Sequence[Lease], spec: Spec) -> tuple[Any, ...]:
        rows, metas = zip(*(self.generate(lease, spec) for lease in leases), strict=True)

        async def all_of_them() -> list[GroupMeta]:
            return [await meta for meta in metas]

        return (*rows, all_of_them())

    def generate_many(self, prompts: Sequence[Any], specs: Sequence[Spec]) -> asyncio.Future:
        return self.answer(self.latency.draw(self.rng), lambda: [[{"text": ""}] for _ in prompts])

    def update_weights(self, version: Version, flat: Any) -> asyncio.Future:
        def take() -> float:
            self.version = version
            return 0.0

        return self.answer(0.0, take)

    def abort_all(self) -> asyncio.Future:
        return self.answer(0.0, lambda: 0)


class SimulatedReward(_Actor):
    """One call at a time; a batch costs `latency` once."""

    def __init__(self, name: str, start: float, latency: Latency, rng: np.random.Generator) -> None:
        super().__init__(name, start)
        self.latency, self.rng = latency, rng

    def score(self, *payloads: Rows) -> tuple[Any, ...]:
        metas = [replace(rows.meta, reward_mean=0.5, reward_std=0.1) for rows in payloads if rows.meta is not None]
        return (*payloads, self.answer(self.latency.draw(self.rng), lambda: metas))

    def validate(self, samples: np.ndarray, written: Sequence[Any]) -> asyncio.Future:
        return self.answer(self.latency.draw(self.rng), lambda: {"ndcg@10": 0.0, "hr@10": 0.0})


class SimulatedStore:
    """Versions without weights, each held `seconds` after it was put: the two newest, and what is pinned."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.held: list[Version] = []
        self.pinned: set[Version] = set()

    async def put(self, version: Version) -> None:
        await asyncio.sleep(self.seconds)
        self.held = [*(one for one in self.held if one in self.pinned or one == self.held[-1]), version]

    async def versions(self) -> list[Version]:
        return self.held

    async def get(self, version: Version) -> Version:
        return version

    async def pin(self, version: Version) -> None:
        self.pinned.add(version)

    async def unpin(self, version: Version) -> None:
        self.pinned.discard(version)

    async def save(self, version: Version, folder: str, like: str) -> None: ...


@dataclass
class SimulatedPlacement:
    """What `RayPlacement` is to the real controller."""

    rollout_latency: Latency = Latency()
    reward_latency: Latency = Latency()
    start: float = 0.0  # seconds until a new worker answers
    seed: int = 0
    put_seconds: float = 0.0  # until the store has a version
    rollout_kind: type[SimulatedRollout] = SimulatedRollout
    alive: dict[str, _Actor] = field(default_factory=dict)

    def rollout(self, run: Run, config: Config, recipe: Any, name: str, place: int) -> Handle:
        return self._keep(self.rollout_kind(name, self.start, self.rollout_latency, self._rng(), config.group_size))

    def reward(self, run: Run, config: Config, name: str) -> Handle:
        return self._keep(SimulatedReward(name, self.start, self.reward_latency, self._rng()))

    def store(self) -> Handle:
        return Handle(SimulatedStore(self.put_seconds))

    def put(self, value: pa.RecordBatch) -> Rows:
        return Rows(lambda: value)

    def kill(self, actor: Handle) -> None:
        self.alive.pop(actor.target.name, None)
        actor.target.die()

    def here(self) -> str:
        return "simulated"

    def is_store(self, store: Handle, error: ActorDiedError) -> bool:
        return False

    def restart(self) -> None:
        raise NotImplementedError

    def restarted(self) -> bool:
        return False

    def crash(self, name: str) -> None:
        """End a worker as SIGKILL would: the controller learns of it from its calls."""
        self.alive.pop(name).die()

    def _keep(self, actor: _Actor) -> Handle:
        self.alive[actor.name] = actor
        return Handle(actor)

    def _rng(self) -> np.random.Generator:
        self.seed += 1
        return np.random.default_rng(self.seed)


class SimulatedRecipe:
    """Samples in an order that follows from the seed; prompts of one token."""

    model, context = "", 2 * TOKENS
    probes: list[np.ndarray] = []  # noqa: RUF012 - nobody adds any
    validation: tuple[np.ndarray, list[np.ndarray], list[Spec]] = (np.arange(0), [], [])

    def __init__(self, seed: int = 0, samples: int = 100_000) -> None:
        self.seed, self.samples = seed, samples

    def draw(self, number: int) -> tuple[int, int]:
        return (number * 7919 + self.seed) % self.samples, number

    def prompts(self, samples: Sequence[int] | np.ndarray) -> list[np.ndarray]:
        return [_PROMPT] * len(samples)

    def rollout_spec(self, seed: int) -> SamplingSpec:
        return _SPEC

    def judge(self) -> Any:
        raise NotImplementedError


_PROMPT, _SPEC = np.zeros(1, np.int32), SamplingSpec()


@dataclass
class Consumed:
    """What a simulated learner saw of one step."""

    step: int
    groups: list[int]
    oldest: int
    version: int
    waited: float
    trained: float


async def learn(
    controller: Controller, latency: Latency, rng: np.random.Generator, *, seen: Callable[[Consumed], None]
) -> None:
    """One learner rank from the newest checkpoint to the end, as `actors.learner` runs it but for the learning."""
    loop, config, run = asyncio.get_running_loop(), controller.config, controller.run
    await controller.start()
    await controller.learner_starts()
    step = checkpoints.newest(run.checkpoints) or 0
    attempt = await controller.attach(0, 0, "simulated", step)
    stored = asyncio.ensure_future(controller.store.put.remote(Version(attempt, step)))
    await stored
    await controller.attached(Version(attempt, step))
    while True:
        began = loop.time()
        batch: Batch | None = await controller.next_batch(step, attempt)
        if batch is None:
            return
        waited = loop.time() - began
        trained = latency.draw(rng)
        await asyncio.sleep(trained)
        metas = list(controller.steps.metas)
        oldest = min(meta.oldest for meta in metas)
        seen(Consumed(step, [meta.group for meta in metas], oldest, batch.version.number, waited, trained))
        version = Version(attempt, step + 1)
        await stored
        stored = asyncio.ensure_future(controller.store.put.remote(version))
        seconds = {"wait": waited, "total": waited + trained}
        record = {"attempt": attempt, "step": step, "version": batch.version.number, "cpu_seconds": 0.0}
        await controller.finished_step(step, version, {**record, "seconds": seconds}, None, [stored])
        step += 1
        if step % config.checkpoint_every == 0 or step == config.steps:
            await stored
            checkpoints.begin(run.checkpoints, step)
            await controller.commit(step, attempt)


def on_virtual_clock(work: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine to its end in simulated time; returns its result."""
    with asyncio.Runner(loop_factory=VirtualClock) as runner:
        return runner.run(work)


def _rows(lease: Lease, meta: GroupMeta | None) -> pa.RecordBatch:
    assert meta is not None
    versions, size = meta.versions, len(meta.lengths)
    cut = np.linspace(0, TOKENS, len(versions) + 1).astype(int)
    spans = tuple((version, int(cut[i]), int(cut[i + 1])) for i, version in enumerate(versions))
    one = Generated(np.zeros(TOKENS, np.int32), np.zeros(TOKENS, np.float32), spans, "length", "x" * TOKENS)
    return rollout_batch(lease, [one] * size, [["x"] * TOKENS] * size)
