"""One training, as the parts of the controller share it: what they read, record, and wake each other by."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

from ray.exceptions import ObjectLostError

from actors import checkpoints
from actors.cluster import last_words
from actors.journal import Journal
from actors.placement import Placement
from rporec.config import Config, ConfigError
from rporec.engine.types import Version
from rporec.files import read_json
from rporec.recipes import Recipe
from rporec.rl.ledger import Group, Ledger
from rporec.run import Run

# One bad prompt is dropped; so many in a row, with none that came through, are another fault.
POISONED_IN_A_ROW = 16


class Training:
    """Begins anew, or goes on from the newest checkpoint. `ended` is told of an exception in spawned work.

    Leases, scoring, validation and the others know this and what they are given of one another, never the
    `Controller` that they are parts of.
    """

    def __init__(
        self, run: Run, config: Config, placement: Placement, recipe: Recipe, ended: Callable[[BaseException], None]
    ) -> None:
        self.run, self.config, self.placement, self.recipe = run, config, placement, recipe
        self.journal = Journal(run, config.groups_per_step)
        self.earlier_cpu = 0.0  # CPU seconds of stage 2 before this process
        self.ledger = self._open_ledger()
        self.store: Any = placement.store()
        self.room = asyncio.Event()  # a lease may have become possible
        self.scored = asyncio.Event()  # a group may have become READY
        self.in_a_row = Counter[str]()  # "poisoned", "flat" groups and lost workers by role, since one that was not
        self.tasks: set[asyncio.Task] = set()
        self._ended = ended

    @property
    def on_policy(self) -> bool:
        return self.config.max_staleness == 0

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task:
        """Run `work` beside the loop; an exception in it ends the loop."""
        task = asyncio.get_running_loop().create_task(work, name=work.__name__)
        self.tasks.add(task)
        task.add_done_callback(self._reap)
        return task

    def cancel(self) -> None:
        """End what was spawned and still runs."""
        for task in list(self.tasks):
            task.cancel()

    def failed(self, group: Group, error: BaseException) -> Group | None:
        """One try went wrong. A group that used up its tries is dropped; many in a row end the run."""
        cause = getattr(error, "cause", error)
        if isinstance(cause, ConfigError):
            raise cause
        after = self.ledger.failed(group, last_words(error))
        if after is not None and after.state == "DROPPED":
            self.in_a_row["poisoned"] += 1
            if self.in_a_row["poisoned"] >= POISONED_IN_A_ROW:
                raise RuntimeError(
                    f"{POISONED_IN_A_ROW} groups in a row failed, {self.ledger.max_tries} times each; "
                    f"the last with {last_words(error)}"
                )
        return after

    async def forget_lost(self) -> None:
        """Groups whose rows were on a node that is gone are written anew; a fetch is the only way to know."""

        async def lost(group: Group) -> bool:
            try:
                await group.payload
            except ObjectLostError:
                return True
            return False

        held = self.ledger.held()
        for group, gone in zip(held, await asyncio.gather(*map(lost, held)), strict=True):
            if gone:
                self.ledger.payload_lost(group)
        self.room.set()

    async def snapshot(self, step: int) -> tuple[dict[str, Any], list[Any]]:
        """What the ledger knows for a checkpoint, and the rows of the groups that it lists, whatever was lost."""
        try:
            return await self._snapshot(step)
        except ObjectLostError:
            await self.forget_lost()
            return await self._snapshot(step)

    async def _snapshot(self, step: int) -> tuple[dict[str, Any], list[Any]]:
        snapshot = self.ledger.snapshot(step)
        held = [self.ledger.group(number) for number in snapshot["payload_ids"]]
        return snapshot, await asyncio.gather(*(group.payload for group in held if group is not None))

    def _open_ledger(self) -> Ledger:
        """A new ledger, or that of the newest checkpoint when the run is resumed."""
        settings: dict[str, Any] = {
            "max_staleness": self.config.max_staleness,
            "groups_per_step": self.config.groups_per_step,
            "max_tries": self.config.rl.max_tries,
        }
        newest, earlier = checkpoints.newest(self.run.checkpoints), self.journal.status()
        attempt = earlier.get("attempt", -1) + 1  # never one that was used, for late messages go by it
        if newest is None:
            self.journal.cut(0)
            return Ledger(version=Version(attempt, 0), **settings)
        self.journal.best = read_json(self.run.folder / "best.json", {})
        self.earlier_cpu = earlier.get("cpu_seconds", 0.0)
        step, snapshot, rows = checkpoints.read_ledger(checkpoints.place(self.run.checkpoints, newest))
        payloads = {number: self.placement.put(group) for number, group in rows.items()}
        ledger = Ledger.restore(snapshot, payloads, **settings)
        ledger.rollback(Version(max(attempt, ledger.version.attempt + 1), step), step)
        self.journal.cut(step)
        return ledger

    def _reap(self, task: asyncio.Task) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._ended(error)


async def signal(event: asyncio.Event) -> None:
    """Wait until `event` is set, and clear it: the one who waits is the one who acts on it."""
    await event.wait()
    event.clear()
