"""Scoring: groups that are written wait in a pile, reward workers take it, and their verdict is acted on."""

from __future__ import annotations

import asyncio
import time

from ray.exceptions import ObjectLostError, RayError

from actors.staff import Staff
from actors.training import Training
from actors.workers import Worker, answer, is_death
from rporec.rl.ledger import Group
from rporec.rl.rollout_schema import GroupMeta

# Groups that one reward call may hold: enough to batch, few enough to return within a second.
REWARD_BATCH = 32
# Seconds for which a reward worker waits for company for the first group: a call costs more than a group does.
GATHER = 0.2
# Steps' worth of flat groups in a row after which dynamic sampling would draw for ever.
FLAT_STEPS = 20


class Scoring:
    """GENERATED groups become READY, or are dropped."""

    def __init__(self, training: Training, staff: Staff) -> None:
        self.training, self.staff = training, staff
        self.config, self.ledger, self.journal = training.config, training.ledger, training.journal
        self.written: list[Group] = []  # to be scored
        self.wrote = asyncio.Event()  # `written` has grown, or the last group that ran has ended
        self._suspects: set[int] = set()  # groups to be scored alone: a batch with them has failed

    def may_score(self) -> bool:
        return bool(self.written) and (not self.training.on_policy or not self.ledger.running)

    async def gather(self) -> None:
        """Let a pile that is small grow a little; on policy it is whole."""
        if not self.training.on_policy and len(self.written) < REWARD_BATCH:
            await asyncio.sleep(GATHER)

    def take_written(self) -> list[Group]:
        """As much as has piled up; a suspect alone."""
        if self.training.on_policy:
            self.written.sort(key=lambda group: group.id)
        pile = self.written[:REWARD_BATCH]
        suspect = next((at for at, group in enumerate(pile) if group.id in self._suspects), len(pile))
        taken = pile[: max(1, suspect)]
        del self.written[: len(taken)]
        return taken

    async def reward(self, worker: Worker, groups: list[Group]) -> None:
        """One call of a reward worker, that is idle again when this ends."""
        began = time.monotonic()
        *scored, report = worker.actor.score.options(num_returns=len(groups) + 1).remote(
            *(group.payload for group in groups)
        )
        try:
            metas: list[GroupMeta] = await answer(report, self.config.reward.timeout, "reward.timeout")
        except (RayError, TimeoutError) as error:
            self._unscored(worker, groups, error)
        else:
            self.training.in_a_row["reward"] = 0
            for group, payload, meta in zip(groups, scored, metas, strict=True):
                if judged := self.ledger.scored(group, payload, meta):
                    self._judged(judged, meta)
        finally:
            self.journal.reward_seconds += time.monotonic() - began
            self.staff.free(worker)
            self.training.scored.set()
            self.training.room.set()

    def _unscored(self, worker: Worker, groups: list[Group], error: BaseException) -> None:
        """Try again elsewhere if the worker is gone, else one by one: only the culprit is to pay with a try."""
        if gone := is_death(error):
            self.staff.lost(worker, error)
        if isinstance(getattr(error, "cause", None), ObjectLostError):
            self.training.spawn(self._without_lost(groups))
            return
        if len(groups) == 1 and (not gone or groups[0].id in self._suspects):
            after = self.training.failed(groups[0], error)
            if after is not None and after.state == "DROPPED":
                self._suspects.discard(after.id)
            return
        self._suspects.update(group.id for group in groups)
        self.written += groups
        self.wrote.set()

    async def _without_lost(self, groups: list[Group]) -> None:
        """Score again those whose rows are still there; the others are written anew, which costs no try."""
        await self.training.forget_lost()
        self.written += groups
        self.forget_undone()
        self.wrote.set()

    def forget_undone(self) -> None:
        """Leave out what the ledger has taken back since it was written."""
        self.written = [group for group in self.written if self.ledger.group(group.id) is group]

    def _judged(self, group: Group, meta: GroupMeta) -> None:
        in_a_row = self.training.in_a_row
        self._suspects.discard(group.id)
        in_a_row["poisoned"] = 0
        in_a_row["flat"] = in_a_row["flat"] + 1 if meta.flat else 0
        self.journal.seen.update(scored=1, flat=int(meta.flat))
        if not (meta.flat and self.config.rl.dynamic_sampling):
            self.ledger.ready(group)
            return
        self.ledger.drop(group, "flat")
        if in_a_row["flat"] >= FLAT_STEPS * self.config.groups_per_step:
            raise RuntimeError(
                f"the last {in_a_row['flat']} groups had one reward each, so rl.dynamic_sampling drops them all: "
                "the policy has collapsed; raise rl.kl, lower rl.lr, or switch dynamic sampling off"
            )
