"""Trainers that take turns on one machine: each a process with all that it starts, stopped while another is timed.

A trainer writes one line for every step. It is stopped (SIGSTOP) when it has taken a step, so a turn, from its
going on to a later line, holds whole steps of a trainer that is synchronous, and of one that is not as much as in
any other stretch of its way.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from rporec.files import read_lines
from rporec.run import RunError

POLL = 0.02  # seconds


@dataclass(frozen=True)
class Turn:
    steps: int
    wall: float  # seconds
    cpu: float  # seconds, of all its processes


class Side:
    """A trainer; `steps` is the file whose lines it writes, `log` where its output goes."""

    def __init__(
        self, name: str, command: Sequence[str], env: Mapping[str, str], steps: Path, log: Path, cores: set[int]
    ) -> None:
        self.name, self.steps, self.log = name, steps, log
        with log.open("w") as out:
            self._process = psutil.Popen(
                command,
                env={**os.environ, **env},
                stdout=out,
                stderr=subprocess.STDOUT,
                preexec_fn=lambda: os.sched_setaffinity(0, cores),
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def warm_up(self, steps: int, timeout: float) -> None:
        """Let it take its first steps, and stop it."""
        self._wait(lambda taken: taken >= steps, timeout)
        self._signal(signal.SIGSTOP)

    def turn(self, seconds: float, timeout: float) -> Turn:
        """Let it go on for a step at least, and on for `seconds`; then it is stopped again."""
        before, cpu, began = self._taken(), self._cpu(), time.perf_counter()
        self._signal(signal.SIGCONT)
        taken = self._wait(lambda taken: taken > before and time.perf_counter() - began >= seconds, timeout, before)
        wall = time.perf_counter() - began
        self._signal(signal.SIGSTOP)
        return Turn(taken - before, wall, self._cpu() - cpu)

    def end(self) -> None:
        """End it and whatever it has started."""
        tree = self._tree()
        self._signal(signal.SIGCONT)
        with contextlib.suppress(psutil.NoSuchProcess):
            self._process.terminate()
        _, alive = psutil.wait_procs(tree, timeout=20)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=5)

    def _wait(self, enough: Callable[[int], bool], timeout: float, at_first: int = 0) -> int:
        """The number of steps as soon as a new one makes it enough. RunError when it ends or takes too long."""
        deadline, last = time.perf_counter() + timeout, at_first
        while True:
            taken = self._taken()
            if taken > last and enough(taken):
                return taken
            last = taken
            if self._process.poll() is not None or time.perf_counter() > deadline:
                what = f"no step within {timeout:g} s" if self._process.poll() is None else "it ended"
                words = " ".join(self.log.read_text(errors="replace")[-600:].split())
                raise RunError(f"benchmark: {self.name}: {what}: {words}")
            time.sleep(POLL)

    def _taken(self) -> int:
        return len(read_lines(self.steps))

    def _tree(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            return [self._process, *self._process.children(recursive=True)]
        return []

    def _signal(self, number: int) -> None:
        for process in self._tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def _cpu(self) -> float:
        """Seconds so far, of those that live and of those that they have waited for."""
        seconds = 0.0
        for process in self._tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                seconds += times.user + times.system + times.children_user + times.children_system
        return seconds


def in_turns(sides: Sequence[Side], *, rounds: int, seconds: float, timeout: float) -> dict[str, list[Turn]]:
    """By name, the turns of each side; a round is one turn of every side. They must have warmed up."""
    turns: dict[str, list[Turn]] = {side.name: [] for side in sides}
    for _ in range(rounds):
        for side in sides:
            turns[side.name].append(side.turn(seconds, timeout))
    return turns
