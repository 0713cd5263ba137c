"""Broadcasts of weights: the real controller on simulated workers with a learner that sends, fails, hangs or dies;
and the real sender against real actors, with a group that needs no CUDA."""

from __future__ import annotations

import asyncio
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
import torch

from actors.broadcast import Answer, Order, Sender
from actors.controller import Controller
from actors.simulated import Latency, SimulatedPlacement, SimulatedRecipe, SimulatedStore, learn, on_virtual_clock
from rporec.config import parse_config
from rporec.engine.nccl import Snapshot
from rporec.engine.types import Version
from rporec.run import Run

ENGINE_TESTS = str(Path(__file__).parents[1] / "engine")
STEPS = 9


class Trained:
    """A simulated training whose learner answers orders by `send`; None from it: never."""

    def __init__(
        self,
        folder: Path,
        send: Callable[[Order], Answer | None],
        put_seconds: float = 0.0,
        workers: int = 2,
        seconds: float = 0.5,
    ) -> None:
        config = parse_config(
            {
                "groups_per_step": 8,
                "steps": STEPS,
                "checkpoint_every": 3,
                "rollout_workers": workers,
                "max_staleness": 0,
            }
            | {"engine": {"max_num_seqs": 16}, "rl": {"validate_every": 1000}, "promotion": {"automatic": False}}
        )
        self.placement = SimulatedPlacement(Latency(1.0, 0.5), start=5.0, put_seconds=put_seconds)
        self.controller = Controller(Run(folder), config, self.placement, SimulatedRecipe())
        self.send, self.sent, self.seconds = send, list[tuple[str, Version]](), seconds

    async def run(self) -> dict[str, Any]:
        await self.controller.start()
        sending = asyncio.create_task(self._serve(0))
        await learn(self.controller, Latency(1.0), np.random.default_rng(0), seen=lambda _: None)
        await self.controller.stop()
        sending.cancel()
        return self.controller._status()

    async def _serve(self, attempt: int) -> None:
        answer = None
        while (order := await self.controller.next_order(attempt, answer)) is not None:
            await asyncio.sleep(self.seconds)
            if (answer := self.send(order)) is None:
                await asyncio.Event().wait()
            elif answer.sent:
                await order.actor.update_weights.remote(order.version, None)
                self.sent.append((order.worker, order.version))


def assert_whole(status: dict[str, Any]) -> None:
    assert status["state"] == "FINISHED"
    assert status["groups"]["CONSUMED"] == STEPS * 8
    assert sum(status["groups"]["DROPPED"].values()) + STEPS * 8 == status["admitted"]


def lines(status: dict[str, Any]) -> list[str]:
    return [notice["message"] for notice in status["notices"]]


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[Version]:
    """Versions that were fetched from the store; one that it does not hold yet ends the run."""
    fetched: list[Version] = []

    async def get(self: SimulatedStore, version: Version) -> Version:
        assert version in self.held
        fetched.append(version)
        return version

    monkeypatch.setattr(SimulatedStore, "get", get)
    return fetched


@pytest.mark.parametrize("put_seconds", [0.0, 2.5])
def test_what_the_learner_sends_is_not_fetched_from_the_store(tmp_path: Path, loaded: list, put_seconds: float) -> None:
    trained = Trained(tmp_path, lambda _: Answer(True), put_seconds)
    status = on_virtual_clock(trained.run())
    assert_whole(status)
    assert loaded == []
    needed = {(worker, Version(0, number)) for worker in ("rollout-0", "rollout-1") for number in range(1, STEPS)}
    assert needed <= set(trained.sent)
    assert lines(status) == []


def test_a_slow_store_gives_out_no_version_before_it_has_it(tmp_path: Path, loaded: list) -> None:
    """No learner that sends: every version comes from the store, which takes longer than a step."""
    trained = Trained(tmp_path, lambda _: None, put_seconds=2.5)
    trained._serve = lambda _: asyncio.sleep(0)  # type: ignore[method-assign, assignment]
    assert_whole(on_virtual_clock(trained.run()))
    assert {version.number for version in loaded} >= set(range(1, STEPS))


def test_a_broadcast_that_fails_is_told_of_and_the_store_steps_in(tmp_path: Path, loaded: list) -> None:
    broken = Version(0, 4)
    trained = Trained(
        tmp_path, lambda order: Answer(False, "no route") if order.version == broken else Answer(True), put_seconds=0
    )
    status = on_virtual_clock(trained.run())
    assert_whole(status)
    assert loaded == [broken, broken]
    assert lines(status) == [
        f"weights 0.4 did not reach rollout-{worker} by NCCL: no route; it takes them from the store"
        for worker in (0, 1)
    ]
    assert any(version.number > 4 for _, version in trained.sent)  # tried again


def test_a_version_that_the_learner_no_longer_holds_is_no_failure(tmp_path: Path, loaded: list) -> None:
    status = on_virtual_clock(Trained(tmp_path, lambda _: Answer(False)).run())
    assert_whole(status)
    assert lines(status) == []
    assert len(loaded) >= STEPS - 1


def test_after_failures_in_a_row_the_store_is_used_alone(tmp_path: Path, loaded: list) -> None:
    asked: list[Order] = []
    trained = Trained(tmp_path, lambda order: asked.append(order) or Answer(False, "no route"))  # type: ignore[func-returns-value]
    status = on_virtual_clock(trained.run())
    assert_whole(status)
    assert 3 <= len(asked) <= 4  # the next one may be under way by then
    assert ["from here on" in line for line in lines(status)] == [False, False, False, True]


def test_orders_that_queue_behind_others_are_waited_for(tmp_path: Path, loaded: list) -> None:
    """13 workers, ten seconds each: the last order takes longer than one may."""
    trained = Trained(tmp_path, lambda _: Answer(True), workers=13, seconds=10.0)
    status = on_virtual_clock(trained.run())
    assert_whole(status)
    assert lines(status) == []
    assert len(trained.sent) > 13


def test_a_learner_that_never_answers_is_given_up(tmp_path: Path, loaded: list) -> None:
    status = on_virtual_clock(Trained(tmp_path, lambda _: None).run())
    assert_whole(status)
    assert ["no answer from the learner within 120 s" in line for line in lines(status)] == [True, False]
    assert "from here on" in lines(status)[-1]
    assert sum("from here on" in line for line in lines(status)) == 1


def test_the_open_question_of_a_dead_learner_takes_no_order_along(tmp_path: Path) -> None:
    async def work() -> None:
        controller = Trained(tmp_path, lambda _: None).controller
        await controller.start()
        dead = asyncio.create_task(controller.next_order(0, None))
        await asyncio.sleep(0)
        await controller.attach(0, 1, "simulated", 0)
        await controller.attach(0, 2, "simulated", 0)  # rank 0 again: the attempt is undone
        assert await dead is None
        alive = asyncio.create_task(controller.next_order(1, None))
        await asyncio.sleep(0)
        worker = controller.rollouts.alive[0]
        bringing = asyncio.create_task(controller.weights.broadcasts.bring(worker, Version(1, 0)))
        order = await alive
        assert order is not None
        assert (order.worker, order.version) == (worker.name, Version(1, 0))
        again = asyncio.create_task(controller.next_order(1, Answer(True)))
        assert await bringing
        again.cancel()
        controller.rollouts.stop()

    on_virtual_clock(work())


# --- the sender ----------------------------------------------------------------------------------
class Asleep:
    """A controller of no cluster: its sender asks it for nothing."""

    def __init__(self) -> None:
        self.over = threading.Event()
        self.next_order = self

    def remote(self, *_: Any) -> None:
        self.over.wait()


@pytest.fixture
def sender(monkeypatch: pytest.MonkeyPatch) -> Iterator[Sender]:
    monkeypatch.setattr(ray, "get", lambda answer, timeout=None: answer)
    controller = Asleep()
    sender = Sender(controller, attempt=0, world=2)
    yield sender
    controller.over.set()
    sender._thread.join(10)


def test_the_copy_of_a_version_is_gone_before_the_next_is_made(sender: Sender) -> None:
    sender.hold(Version(0, 1), [("w", torch.ones(2))])
    assert sender._held is not None
    before = weakref.ref(sender._held.tensors[0])
    there: list[bool] = []

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        there.append(before() is not None)
        meanwhile = Order("rollout-0", None, Version(0, 1), frozenset())
        assert sender._send(meanwhile) == Answer(False)  # as after the next one: no failure, the store has it
        yield "w", torch.ones(2)

    sender.hold(Version(0, 2), weights())
    assert there == [False]
    assert sender._held.version == Version(0, 2)


def test_a_broadcast_under_way_keeps_its_copy(sender: Sender) -> None:
    sent: list[torch.Tensor] = []

    class Group:
        def send(self, snapshot: Snapshot) -> None:
            sender.hold(Version(0, 2), [("w", torch.zeros(2))])
            sent.extend(snapshot.tensors)

    engine = SimpleNamespace(receive_weights=SimpleNamespace(remote=lambda *_: None))
    sender._channels["rollout-0"] = Group()  # type: ignore[assignment]
    sender.hold(Version(0, 1), [("w", torch.ones(2))])
    assert sender._send(Order("rollout-0", engine, Version(0, 1), frozenset({"rollout-0"}))) == Answer(True)
    assert sent[0].tolist() == [1.0, 1.0]


@ray.remote(num_cpus=0)
class Engine:
    """A rollout worker that keeps what it receives; `fails` instead when told so."""

    def __init__(self, tests: str) -> None:
        sys.path.append(tests)
        self.group: Any = None
        self.joined = 0
        self.fails = False
        self.received: dict[str, torch.Tensor] = {}

    def status(self) -> None: ...

    def fail(self, fails: bool) -> None:
        self.fails = fails

    def join(self, address: str, port: int, world: int) -> None:
        from host_group import HostGroup

        self.group, self.joined = HostGroup(address, port, 1, world), self.joined + 1

    def receive_weights(self, version: Version, described: list[Any]) -> None:
        if self.fails:
            raise RuntimeError("the engine refused")
        for name, dtype, shape in described:
            self.received[name] = torch.empty(shape, dtype=getattr(torch, dtype))
            self.group.broadcast(self.received[name], src=0)

    def state(self) -> tuple[int, dict[str, torch.Tensor]]:
        return self.joined, self.received


@ray.remote(num_cpus=0)
class Orders:
    """A controller that knows nothing but orders."""

    def __init__(self) -> None:
        self.orders: asyncio.Queue[Order | None] = asyncio.Queue()
        self.answers: asyncio.Queue[Answer] = asyncio.Queue()

    async def next_order(self, attempt: int, answer: Answer | None) -> Order | None:
        if answer is not None:
            self.answers.put_nowait(answer)
        return await self.orders.get()

    async def give(self, order: Order | None) -> Answer | None:
        self.orders.put_nowait(order)
        return await self.answers.get() if order is not None else None


@pytest.mark.cluster
def test_the_sender_opens_a_group_per_worker_and_a_new_one_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ENGINE_TESTS)
    from host_group import learner_end
    from vllm.distributed.weight_transfer import nccl_common

    monkeypatch.setattr(nccl_common, "trainer_init", learner_end)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        controller, engines = Orders.remote(), [Engine.remote(ENGINE_TESTS) for _ in range(2)]
        sender = Sender(controller, attempt=0, world=2)

        def order(number: int, version: Version) -> Answer:
            one = Order(f"rollout-{number}", engines[number], version, frozenset({"rollout-0", "rollout-1"}))
            return ray.get(controller.give.remote(one), timeout=60)

        assert order(0, Version(0, 1)) == Answer(False)  # it holds nothing yet
        weight = torch.arange(6.0).reshape(2, 3)
        [(_, copy)] = sender.hold(Version(0, 1), [("w", weight.T)])
        weight += 100  # the next step
        assert torch.equal(copy, torch.arange(6.0).reshape(2, 3).T)
        assert [order(0, Version(0, 1)), order(1, Version(0, 1))] == [Answer(True), Answer(True)]
        for engine in engines:
            joined, received = ray.get(engine.state.remote())
            assert joined == 1
            assert torch.equal(received["w"], copy)

        sender.hold(Version(0, 2), [("w", weight.bfloat16())])
        assert order(0, Version(0, 1)) == Answer(False)
        ray.get(engines[0].fail.remote(True))
        answer = order(0, Version(0, 2))
        assert not answer.sent
        assert "the engine refused" in answer.trouble
        ray.get(engines[0].fail.remote(False))
        assert [order(0, Version(0, 2)), order(1, Version(0, 2))] == [Answer(True), Answer(True)]
        assert [ray.get(engine.state.remote())[0] for engine in engines] == [2, 1]  # only the broken group is new
        assert torch.equal(ray.get(engines[0].state.remote())[1]["w"], weight.bfloat16())

        ray.kill(engines[1])
        gone = order(1, Version(0, 2))
        assert not gone.sent
        assert gone.trouble
        ray.get(controller.give.remote(None))
        sender._thread.join(10)
        named = [("w", weight)]
        assert sender.hold(Version(0, 3), named) is named  # nobody asks any more: no copy
    finally:
        ray.shutdown()
