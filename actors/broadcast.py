"""New weights from the learner's GPU to a rollout worker's by NCCL, and to the object store when that fails.

Each rollout worker has a group of its own with the learner's rank 0: workers join late, validate
under older weights and die, and no other worker's group is touched by that. `Broadcasts` is the
controller's side: it says which worker is to have the weights now. `Sender` is the learner's: a
thread beside the training that asks for the next one. Whatever goes wrong, the worker takes the same
version from the `WeightStore`, and its group is made anew the next time.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from actors.cluster import last_words
from actors.workers import Worker, Workers
from rporec.engine.nccl import Channel, Snapshot
from rporec.engine.types import Version

SEND_PATIENCE = 30.0  # seconds for one worker, before the learner leaves the group
PATIENCE = 120.0  # seconds for an answer from the learner, and for a load from the store by a worker that may hang
FAILURES_IN_A_ROW = 3  # after which NCCL is given up until the learner starts again


@dataclass(frozen=True)
class Order:
    """One worker to send to, and who else is there: groups of others can be left."""

    worker: str
    actor: Any
    version: Version
    alive: frozenset[str]


@dataclass(frozen=True)
class Answer:
    """`trouble` says why not; "" when the learner has published a newer version meanwhile."""

    sent: bool
    trouble: str = ""


class Broadcasts:
    """The controller's side. `tell` gets one line for each failure."""

    def __init__(self, workers: Workers, tell: Callable[[str], None]) -> None:
        self._workers, self._tell = workers, tell
        self._learner: int | None = None  # the attempt of the one that asks for orders
        self._over = -1  # learners of this attempt and earlier ones get no more
        self._orders: asyncio.Queue[tuple[Order, asyncio.Future[Answer]] | None] = asyncio.Queue()
        self._under_way: asyncio.Future[Answer] | None = None
        self._moved = 0.0  # when it was begun, by the loop's clock
        self._failures = 0  # since the last success
        # Seconds for a load from the store; a worker that was in a group may hang in it.
        self.patience: float | None = None

    @property
    def serving(self) -> bool:
        """Whether a learner is there to send what the store may not have yet."""
        return self._learner is not None

    async def bring(self, worker: Worker, version: Version) -> bool:
        """Whether the learner has brought `version` to the worker; if not, let it load from the store."""
        if not self.serving:
            return False
        order = Order(worker.name, worker.actor, version, frozenset(one.name for one in self._workers.alive))
        answered: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._orders.put_nowait((order, answered))
        try:
            answer = await self._answer_to(answered)
        except TimeoutError:
            self._failures = FAILURES_IN_A_ROW  # its thread hangs, and so would every other order
            answer = Answer(False, f"no answer from the learner within {PATIENCE:g} s")
        if answer.sent:
            self._failures = 0
        elif answer.trouble:
            self._failed(worker, version, answer.trouble)
        return answer.sent

    async def _answer_to(self, answered: asyncio.Future[Answer]) -> Answer:
        """TimeoutError when the learner, which takes one order after the other, has come no further for too long."""
        clock = asyncio.get_running_loop().time
        queued = clock()
        try:
            while not answered.done():
                left = max(queued, self._moved) + PATIENCE - clock()
                if left <= 0:
                    raise TimeoutError
                await asyncio.wait([answered], timeout=left)
            return answered.result()
        finally:
            answered.cancel()  # an order that nobody waits for any more is not begun

    async def next(self, attempt: int, answer: Answer | None) -> Order | None:
        """What the learner is to send, once it has told how the last order went; None: nothing any more."""
        if attempt <= self._over:
            return None
        self._learner, self.patience = attempt, PATIENCE
        if answer is not None:
            _answer(self._under_way, answer)
        orders = self._orders
        while (item := await orders.get()) is not None:
            order, answered = item
            if not answered.done():  # else it was waited for no longer
                self._under_way, self._moved = answered, asyncio.get_running_loop().time()
                return order
        return None

    def end(self, attempt: int) -> None:
        """No more from the learner of `attempt`: not even its open question may take an order along."""
        before, self._orders = self._orders, asyncio.Queue()
        while not before.empty():
            if (item := before.get_nowait()) is not None:
                _answer(item[1], Answer(False))
        before.put_nowait(None)
        _answer(self._under_way, Answer(False))
        self._learner, self._over, self._under_way, self._failures = None, attempt, None, 0

    def _failed(self, worker: Worker, version: Version, trouble: str) -> None:
        self._failures += 1
        self._tell(f"weights {version} did not reach {worker.name} by NCCL: {trouble}; it takes them from the store")
        if self._failures >= FAILURES_IN_A_ROW and self._learner is not None:
            self._tell("broadcasts by NCCL fail again and again: weights go by the object store from here on")
            self.end(self._learner)


class Sender:
    """Rank 0's side; `hold` what is to be sent. Lives until the controller says that nothing more comes."""

    def __init__(self, controller: Any, attempt: int, world: int) -> None:
        self._controller, self._attempt, self._world = controller, attempt, world
        self._held: Snapshot | None = None
        self._channels: dict[str, Channel] = {}
        self._thread = threading.Thread(target=self._serve, name="sender", daemon=True)
        self._thread.start()

    def hold(self, version: Version, named: Iterable[tuple[str, Any]]) -> Iterable[tuple[str, Any]]:
        """Copy the weights on the device and keep them until the next ones; returns the copies.

        The ones before are let go of first, so that the device has room for one copy; only a broadcast under way
        keeps them to its end. Who asks for them meanwhile is told what it is told after: they are held no more.
        """
        if not self._thread.is_alive():
            return named
        self._held = None
        self._held = snapshot = Snapshot.of(version, named)
        return zip(snapshot.names, snapshot.tensors, strict=True)

    def _serve(self) -> None:
        answer = None
        with contextlib.suppress(RayError):  # what became of the controller, the training learns from its own calls
            while (order := ray.get(self._controller.next_order.remote(self._attempt, answer))) is not None:
                answer = self._send(order)
        self._held = None

    def _send(self, order: Order) -> Answer:
        snapshot = self._held
        if snapshot is None or snapshot.version != order.version:
            return Answer(False)
        for gone in self._channels.keys() - order.alive:
            self._channels.pop(gone).close()
        try:
            channel = self._channels.get(order.worker) or self._open(order, snapshot)
            receiving = order.actor.receive_weights.remote(order.version, snapshot.described)
            channel.send(snapshot)
            ray.get(receiving, timeout=SEND_PATIENCE)
        except Exception as error:  # of Ray, of NCCL, of the worker: the store is the way out of all of them
            if (broken := self._channels.pop(order.worker, None)) is not None:
                broken.close()
            return Answer(False, last_words(error))
        return Answer(True)

    def _open(self, order: Order, snapshot: Snapshot) -> Channel:
        ray.get(order.actor.status.remote(), timeout=SEND_PATIENCE)  # nobody waits in a group for a dead worker
        address, port = ray.util.get_node_ip_address(), _free_port()
        joining = order.actor.join.remote(address, port, self._world)
        channel = self._channels[order.worker] = Channel(address, port, self._world, snapshot.tensors[0].device)
        ray.get(joining, timeout=SEND_PATIENCE)
        return channel


def _answer(waiting: asyncio.Future[Answer] | None, answer: Answer) -> None:
    if waiting is not None and not waiting.done():
        waiting.set_result(answer)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
