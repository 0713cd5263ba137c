"""How many workers of each role a run wants: a rule on measured waiting. Pure; the controller acts on it.

The *load* of a role is the share of its slots that are taken, plus what queues for one in units of all
slots: below 1 slots stand empty, above 1 work waits. Groups in flight are bounded, so they pile up before
the role that limits the pace; that is how it is known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean

# The learner may wait a fifth of its time before another worker is worth its place.
STARVING = 0.2
# A role with less load than this has more workers than the learner can use.
IDLE = 0.5


@dataclass
class Autoscaler:
    """Looks at the last `steps` learner steps; after each decision it looks at as many new ones."""

    bounds: Mapping[str, tuple[int, int]]  # least and most workers of each role that scales
    steps: int = 5
    _seen: list[tuple[float, Mapping[str, float]]] = field(default_factory=list)

    def observe(self, waiting: float, loads: Mapping[str, float]) -> None:
        """Of one learner step: the share of its time that it waited for groups, and the load of every role.

        A role that does not scale belongs in `loads` too: where it is what limits, no other one grows.
        """
        self._seen.append((waiting, loads))

    def wanted(self, workers: Mapping[str, int]) -> dict[str, int]:
        """From now on, of each role that scales; `workers`: what was wanted so far, by hand beyond the bounds too.

        While the learner starves the role with the highest load gets one more, up to its bound; else those that idle
        have one fewer, down to theirs. One at a time, since a worker takes longer to start than a step: the effect
        is to be seen first.
        """
        changes = self._changes()
        return {role: self._bounded(role, workers[role], changes.get(role, 0)) for role in self.bounds}

    def _bounded(self, role: str, count: int, change: int) -> int:
        low, high = self.bounds[role]
        return min(max(count + change, min(low, count)), max(high, count))

    def _changes(self) -> dict[str, int]:
        if len(self._seen) < self.steps:
            return {}
        waiting = fmean(waiting for waiting, _ in self._seen)
        loads = {role: fmean(loads[role] for _, loads in self._seen) for role in self._seen[0][1]}
        self._seen.clear()
        if waiting > STARVING:
            limit = max(loads, key=lambda role: loads[role])
            return {limit: 1} if loads[limit] > IDLE else {}
        return {role: -1 for role, load in loads.items() if load < IDLE}
