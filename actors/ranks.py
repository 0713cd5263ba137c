"""The learner ranks, as the controller sees them: which are there, and how often they came back."""

from __future__ import annotations

from typing import Any

from actors.cluster import last_words
from actors.journal import Journal

# Of the learner group from one checkpoint, after which it is given up.
MAX_RESTARTS = 3


class Ranks:
    """Ray Train starts and restarts them; this knows who was here before."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._members: list[dict[str, Any]] = []
        self._starts = 0  # of the group, since its last commit and with the one that made it

    def start(self) -> None:
        """The group is about to load the newest checkpoint; RuntimeError when that has led nowhere too often."""
        self._starts += 1
        if self._starts > 1 + MAX_RESTARTS:
            raise RuntimeError(f"the learner died {MAX_RESTARTS + 1} times without reaching another checkpoint")

    def committed(self) -> None:
        self._starts = 1

    def attach(self, rank: int, pid: int, node: str) -> bool:
        """A rank has started; returns whether it replaces one that was here before."""
        name = f"learner-{rank}"
        former = next((one for one in self._members if one["name"] == name), None)
        if former is not None and former["state"] == "ALIVE":
            self._journal.died("learner", name, former["pid"], former["node"], "its process ended")
        self._members = [one for one in self._members if one["name"] != name]
        self._members.append({"role": "learner", "name": name, "node": node, "pid": pid, "state": "ALIVE"})
        return former is not None

    def failed(self, rank: int, pid: int, node: str, error: BaseException) -> None:
        self._journal.died("learner", f"learner-{rank}", pid, node, last_words(error))
        dead = {"name": f"learner-{rank}", "node": node, "pid": pid}  # pids alone coincide across containers
        self._members = [{**one, "state": "DEAD"} if dead.items() <= one.items() else one for one in self._members]

    def stop(self) -> None:
        self._members = [{**one, "state": "STOPPED"} for one in self._members]

    def describe(self) -> list[dict[str, Any]]:
        """As `rporec status --json` lists them."""
        return self._members
