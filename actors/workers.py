"""The workers of one role as the controller sees them: started, described, mourned.

What they do is the controller's to decide; this knows which there are.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ray.exceptions import RayError, RayTaskError

from actors.cluster import last_words
from rporec.engine.types import FIRST_VERSION, EngineError, GenerationAborted, Version

RETIREMENT_POLL = 0.1  # seconds


@dataclass
class Worker:
    """One rollout or reward worker."""

    name: str
    place: int  # among those of its role; a replacement takes the place of the dead
    actor: Any
    slots: int  # calls it may hold at once: groups to write, or one batch to score
    running: int = 0
    pid: int = 0
    node: str = ""
    state: str = "STARTING"  # ALIVE, LEAVING (finishes what it holds), DEAD, STOPPED
    start_cpu: float = 0.0  # CPU seconds that its start took
    cpu_seconds: float = 0.0  # since then, as of its last answer
    version: Version = FIRST_VERSION  # of the weights that it has
    settled: Version | None = None  # that it has and has said the probes under
    validating: bool = False  # no leases: what they sampled would grow stale behind the pinned version
    # Held while weights enter or a validation is being written: a validation has one version.
    weights: asyncio.Lock = field(default_factory=asyncio.Lock)


class Workers:
    """Those of one role, `wanted` in number. `start(name, place)` makes the actor of one, `kill` ends it."""

    def __init__(
        self, role: str, wanted: int, slots: int, start: Callable[[str, int], Any], kill: Callable[[Any], None]
    ) -> None:
        self.role, self.wanted, self.slots = role, wanted, slots
        self._start, self._kill = start, kill
        self._members: list[Worker] = []
        self._started = 0
        self._buried_cpu = 0.0  # of the dead

    @property
    def alive(self) -> list[Worker]:
        return [worker for worker in self._members if worker.state == "ALIVE"]

    @property
    def left(self) -> list[Worker]:
        """Those that live or may yet, and are to stay."""
        return [worker for worker in self._members if worker.state in ("STARTING", "ALIVE")]

    @property
    def vacant(self) -> list[int]:
        """Places that are wanted and nobody has."""
        return sorted(set(range(self.wanted)) - {worker.place for worker in self.left})

    def load(self, queued: float) -> float:
        """Share of the slots of those alive that are taken, with what queues for one; 1 when none is alive.

        queued: in slots, as many as it would fill.
        """
        slots = sum(worker.slots for worker in self.alive)
        return (sum(worker.running for worker in self.alive) + queued) / slots if slots else 1.0

    @property
    def cpu_seconds(self) -> float:
        """What all of them have computed for, the dead included and their starts apart."""
        return self._buried_cpu + sum(worker.cpu_seconds for worker in self._members)

    async def add(self, place: int) -> Worker | None:
        """Start one and wait until it answers; None when it is no longer wanted by then.

        EngineError, with its last words, if it never answers.
        """
        name = f"{self.role}-{self._started}"  # never used twice: a dying actor may still hold its name
        self._started += 1
        worker = Worker(name, place, self._start(name, place), self.slots)
        self._members.append(worker)
        try:
            status = await worker.actor.status.remote()
        except RayError as error:
            if worker.state != "STARTING":
                return None
            self._members.remove(worker)
            raise EngineError(f"{name} did not start: {last_words(error)}") from None
        if worker.state != "STARTING":
            return None  # buried between its answer and this line
        worker.pid, worker.node, worker.start_cpu = status["pid"], status["node"], status["cpu_seconds"]
        worker.state = "ALIVE"
        return worker

    async def retire(self, worker: Worker) -> None:
        """Let one finish what it holds, then end it."""
        if worker.state != "ALIVE" or worker.place < self.wanted:
            return  # it died meanwhile, or is wanted again
        worker.state = "LEAVING"
        while worker.running and worker.state == "LEAVING":
            await asyncio.sleep(RETIREMENT_POLL)
        async with worker.weights:  # a validation goes to its end too
            if worker.state == "LEAVING":
                self.bury(worker)

    def bury(self, worker: Worker) -> None:
        """Strike out one that died, hangs or has retired."""
        worker.state = "DEAD"
        self._kill(worker.actor)  # one that hangs may not come back with late results
        self._members.remove(worker)
        self._buried_cpu += worker.cpu_seconds

    async def measure(self) -> None:
        """Ask all for their CPU seconds; one too busy to answer within a second keeps its last answer."""

        async def ask(worker: Worker) -> None:
            with contextlib.suppress(RayError):
                worker.cpu_seconds = (await worker.actor.status.remote())["cpu_seconds"] - worker.start_cpu

        if asked := [asyncio.ensure_future(ask(worker)) for worker in self.alive]:
            _, late = await asyncio.wait(asked, timeout=1.0)
            for one in late:
                one.cancel()

    def stop(self) -> None:
        for worker in self._members:
            worker.state = "STOPPED"
            self._kill(worker.actor)

    def describe(self) -> list[dict[str, Any]]:
        """As `rporec status --json` lists them."""
        return [
            {"role": self.role, "name": one.name, "node": one.node, "pid": one.pid, "state": one.state}
            for one in self._members
        ]


async def answer(reference: Any, seconds: float, key: str) -> Any:
    """What a worker says within `seconds`, which `key` of the config sets; TimeoutError when it hangs."""
    try:
        return await asyncio.wait_for(reference, seconds)
    except RayError:
        raise  # a TimeoutError of the worker's own code is one too
    except TimeoutError:
        raise TimeoutError(f"no answer within {seconds:g} s ({key})") from None


def is_death(error: BaseException) -> bool:
    """Whether the worker is gone, or its engine in it: a task error is else the fault of what it was given."""
    if isinstance(error, RayTaskError):
        return isinstance(error.cause, EngineError) and not isinstance(error.cause, GenerationAborted)
    return True
