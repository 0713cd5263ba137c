"""Ways to do the same thing, timed in turns, so that what slows the machine down slows all of them down."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from rich.console import Console

from rporec.report.live import progress


@dataclass(frozen=True)
class Rounds:
    """Seconds of each way in each of R rounds, name -> [R]; CPU seconds are of all threads of this process."""

    wall: dict[str, np.ndarray]
    cpu: dict[str, np.ndarray]

    def times(self, slow: str, fast: str, clock: Literal["wall", "cpu"] = "cpu") -> float:
        """How many times as long `slow` takes: the median of the rounds' quotients."""
        seconds = getattr(self, clock)
        return float(np.median(seconds[slow] / seconds[fast]))

    def median(self, clock: Literal["wall", "cpu"]) -> dict[str, float]:
        return {name: float(np.median(seconds)) for name, seconds in getattr(self, clock).items()}


def in_turns(name: str, ways: Mapping[str, Callable[[int], object]], rounds: int) -> Rounds:
    """Call each way with the number of the round, in rounds 1 … `rounds`; round 0 warms up and does not count."""
    found = {clock: {way: np.zeros(rounds) for way in ways} for clock in ("wall", "cpu")}
    with progress(name, total=rounds, console=Console(stderr=True)) as bar:
        for number in range(rounds + 1):
            for way, work in ways.items():
                wall, cpu = time.perf_counter(), time.process_time()
                work(number)
                if number:
                    found["wall"][way][number - 1] = time.perf_counter() - wall
                    found["cpu"][way][number - 1] = time.process_time() - cpu
            bar.update(number)
    return Rounds(**found)
