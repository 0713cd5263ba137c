"""How many rollout workers a run wants: a rule on measured waiting. Pure; the controller acts on it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

# The learner may wait a fifth of its time before another worker is worth its place.
STARVING = 0.2
# Workers whose slots stand empty for this share of the time are more than the learner can use.
IDLE = 0.5


@dataclass
class Autoscaler:
    """Looks at the last `steps` learner steps; after each change it looks at as many new ones."""

    low: int
    high: int
    steps: int = 5
    _waiting: deque[float] = field(default_factory=deque)
    _idle: deque[float] = field(default_factory=deque)

    def observe(self, waiting: float, idle: float) -> None:
        """Of one learner step: the share of its time that it waited for groups, and of slots that stood empty."""
        self._waiting.append(waiting)
        self._idle.append(idle)

    def wanted(self, workers: int) -> int:
        """Workers from now on: one more while the learner starves, one fewer while they idle, within the bounds.

        One at a time, since a worker takes longer to start than a step: the effect is to be seen first.
        """
        if len(self._waiting) < self.steps:
            return min(max(workers, self.low), self.high)
        waiting = sum(self._waiting) / len(self._waiting)
        idle = sum(self._idle) / len(self._idle)
        change = 1 if waiting > STARVING and idle < IDLE else -1 if idle > IDLE and waiting < STARVING else 0
        self._waiting.clear()
        self._idle.clear()
        return min(max(workers + change, self.low), self.high)
