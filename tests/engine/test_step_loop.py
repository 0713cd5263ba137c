"""The thread between an engine and its callers, with a step that does what a test says."""

import threading
import time

import pytest

from rporec.engine.step_loop import StepLoop
from rporec.engine.types import EngineError


class Machine:
    """Counts its steps while it has work; `step` may be replaced."""

    def __init__(self):
        self.work, self.steps, self.ended = 0, 0, []
        self.breaks: Exception | None = None
        self.loop = StepLoop("rollout worker 1", step=self.step, working=lambda: self.work > 0, ended=self.ended.append)

    def step(self):
        if self.breaks is not None:
            raise self.breaks
        self.steps += 1
        self.work -= 1

    def add(self, work):
        self.work += work


@pytest.fixture
def machine():
    machine = Machine()
    yield machine
    machine.loop.close()


def test_it_steps_only_while_there_is_work(machine):
    machine.loop.call(lambda: machine.add(3)).result(5)
    while machine.work:
        time.sleep(0.001)
    assert machine.loop.call(lambda: machine.steps).result(5) == 3


def test_commands_that_wait_are_served_before_the_next_step_in_their_order(machine):
    seen = []
    machine.loop.pause().result(5)
    machine.loop.call(lambda: machine.add(1))
    for number in range(5):
        machine.loop.call(lambda number=number: seen.append((number, machine.steps)))
    machine.loop.resume().result(5)
    assert seen == [(number, 0) for number in range(5)]


def test_a_command_that_fails_is_its_callers_alone(machine):
    with pytest.raises(ZeroDivisionError):
        machine.loop.call(lambda: 1 / 0).result(5)
    assert machine.loop.call(lambda: "alive").result(5) == "alive"
    assert not machine.ended


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (RuntimeError("the kernel broke\nlong trace"), "RuntimeError: the kernel broke; probable cause: a fault"),
        (MemoryError(), r"MemoryError; probable cause: no memory left; lower engine\.max_num_seqs"),
        (
            RuntimeError("CUDA error: an illegal access"),
            "RuntimeError: CUDA error: an illegal access; probable cause: the GPU failed",
        ),
    ],
)
def test_a_step_that_fails_ends_the_engine_and_every_future_says_why(machine, error, cause):
    machine.breaks = error
    served = threading.Event()
    open_future = machine.loop.command(lambda future: (machine.add(1), served.wait(5)))
    behind = machine.loop.command(lambda future: machine.loop.command(lambda future: None))
    served.set()
    machine.loop._thread.join(5)
    [end] = machine.ended
    with pytest.raises(EngineError, match=f"rollout worker 1 died: {cause}"):
        raise end
    assert "\n" not in str(end)
    assert not open_future.done()  # it was served: the engine that holds it answers it in `ended`
    assert not behind.done()
    with pytest.raises(EngineError, match="died"):
        machine.loop.call(lambda: None).result(5)


def test_an_engine_error_in_a_command_ends_the_engine(machine):
    def half():
        raise EngineError("rollout worker 1: weights 0.3 were taken in half")

    with pytest.raises(EngineError, match="in half"):
        machine.loop.call(half).result(5)
    machine.loop._thread.join(5)
    with pytest.raises(EngineError, match=r"died.*in half"):
        machine.loop.call(lambda: None).result(5)


def test_what_is_queued_behind_the_end_fails_instead_of_waiting_for_ever(machine):
    machine.loop.pause().result(5)
    gate = threading.Event()
    machine.loop.call(gate.wait)
    closing = threading.Thread(target=machine.loop.close)
    closing.start()
    time.sleep(0.05)
    late = machine.loop.call(lambda: None)
    gate.set()
    closing.join(5)
    with pytest.raises(EngineError, match="closed"):
        late.result(5)


def test_a_caller_cannot_cancel_what_the_engine_will_answer(machine):
    assert machine.loop.command(lambda future: None).cancel() is False
