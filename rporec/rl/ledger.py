"""The ledger: which state every group is in, and which transitions are allowed. Pure bookkeeping.

No Ray, no clock, no coroutine: the controller calls a method when something has happened and acts on
the answer. `Group` is an immutable value; the one that a caller got from `lease` (or a later step) is
also its ticket, so that whatever comes back too late is recognised and refused.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from rporec.engine.types import Version
from rporec.rl.rollout_schema import GroupMeta

State = Literal["PENDING", "RUNNING", "GENERATED", "SCORED", "READY", "CONSUMED", "DROPPED"]
DropReason = Literal["stale", "flat", "poisoned", "cancelled"]
ReturnReason = Literal["failed", "worker_lost", "payload_lost", "aborted", "undone_version"]

_KEPT = ("READY", "CONSUMED")  # states that a snapshot keeps


@dataclass(frozen=True, slots=True)
class Group:
    """One prompt and its completions, at one moment."""

    id: int
    sample: int
    seed: int
    state: State = "PENDING"
    lease: int = 0  # how often it has been leased; results of an earlier lease are late
    tries: int = 0  # used up by `failed`
    worker: str | None = None  # while RUNNING
    payload: Any = None  # a reference to the rows; the ledger only keeps it alive
    meta: GroupMeta | None = None  # from GENERATED on
    step: int | None = None  # learner step that consumed it
    error: str | None = None  # of the last failed try
    dropped: DropReason | None = None


class Ledger:
    """The state machine PENDING → RUNNING → GENERATED → SCORED → READY → CONSUMED, or DROPPED(reason).

    Invariants:

    - Every admitted group is in exactly one state, and ends as CONSUMED or DROPPED exactly once:
      `admitted == sum of all counts` at any time, whatever crashed.
    - Lock 1, admission. With `leased` = groups neither CONSUMED nor DROPPED, a group is admitted only
      while `leased + consumed < (max_staleness + version + 1) * groups_per_step`. Leasing obeys the same
      lock, counting only groups that are past PENDING (after a rollback more groups are admitted than the
      smaller version allows) and the version that the worker has (`admits`).
    - Lock 2, consumption. No consumed group holds a token of a version older than
      `version - max_staleness`; a READY group that does is DROPPED("stale").
    - No consumed group holds a token of an undone version: `rollback` empties such groups, and a result
      that arrives later with one is refused.
    - A result counts only with the lease under which it was made.
    - CONSUMED is provisional until `committed` covers its step; until then the payload is kept.

    A learner that waits gets its step: while it waits the version stands still and, one version being
    published for each step, `consumed <= version * groups_per_step`, so lock 1 leaves room for at least
    `groups_per_step` groups. Each is consumed, or its end makes room for one sampled by the current
    version, which cannot be stale. With `max_staleness = 0` exactly `groups_per_step` groups are admitted
    for a version and consumed together.

    Steps are counted from 0; "step n is committed" means that the steps 0 … n-1 are. Each operation costs
    O(log groups), `rollback` and `snapshot` O(groups that are alive). Memory is bounded by the locks and
    by the groups consumed since the last commit.
    """

    def __init__(
        self, *, max_staleness: int, groups_per_step: int, max_tries: int = 3, version: Version | None = None
    ) -> None:
        self.max_staleness = max_staleness
        self.groups_per_step = groups_per_step
        self.max_tries = max_tries
        self.version = version or Version(0, 0)  # newest published
        self.step = 0  # the next learner step
        self.committed_step = 0
        self.admitted = 0
        self.events: Counter[str] = Counter()  # returns to PENDING by reason, and `late_result`
        self._limits: dict[int, int] = {}  # of each past attempt: its last version that was not undone
        self._groups: dict[int, Group] = {}  # neither DROPPED nor committed
        self._counts: Counter[str] = Counter()
        self._drops: Counter[str] = Counter()
        self._lengths = {"consumed": [0, 0], "stale": [0, 0]}  # completions, tokens
        self._pending: list[int] = []  # heap of ids
        self._ready: list[tuple[int, int, int]] = []  # heap of (oldest version, id, lease), entries may be outdated
        self._running: dict[str, set[int]] = {}  # worker -> ids
        self._consumed: dict[int, list[int]] = {}  # uncommitted step -> ids

    # --- what the controller asks

    def capacity(self) -> int:
        """How many groups lock 1 lets in now."""
        bound = (self.max_staleness + self.version.number + 1) * self.groups_per_step
        return max(0, bound - self.leased - self._counts["CONSUMED"])

    @property
    def leased(self) -> int:
        """Admitted groups that are neither CONSUMED nor DROPPED."""
        return self.admitted - self._counts["CONSUMED"] - self._counts["DROPPED"]

    def admits(self, number: int) -> bool:
        """Whether lock 1 lets version `number` sample another group: consumed behind all that are active, it would
        not be stale. A worker that lags behind the newest version is given less, or its tokens come too late."""
        active = self.leased - self._counts["PENDING"]
        return active + self._counts["CONSUMED"] < (self.max_staleness + number + 1) * self.groups_per_step

    @property
    def running(self) -> int:
        return self._counts["RUNNING"]

    @property
    def under_way(self) -> int:
        """Groups that are being written or scored."""
        return self._counts["RUNNING"] + self._counts["GENERATED"] + self._counts["SCORED"]

    def counts(self) -> dict[str, Any]:
        """`{"PENDING": n, …, "CONSUMED": n, "DROPPED": {reason: n}}`; they add up to `admitted`."""
        return {s: self._counts[s] for s in get_args(State) if s != "DROPPED"} | {"DROPPED": dict(self._drops)}

    def lengths(self) -> dict[str, float]:
        """Mean tokens of a completion in `consumed` and in `stale` groups: a gap is a bias to short thoughts."""
        return {name: tokens / completions for name, (completions, tokens) in self._lengths.items() if completions}

    def group(self, id: int) -> Group | None:
        """The group as it is now; None once it is dropped or committed."""
        return self._groups.get(id)

    def held(self) -> list[Group]:
        """Groups whose payload is kept."""
        return [group for group in self._groups.values() if group.payload is not None]

    # --- what happens to one group

    def admit(self, sample: int, seed: int) -> Group:
        """A new PENDING group; raises ValueError when `capacity()` is 0."""
        if not self.capacity():
            raise ValueError(f"no capacity: {self.leased} groups are leased at version {self.version.number}")
        group = Group(self.admitted, sample, seed)
        self.admitted += 1
        self._counts["PENDING"] += 1
        self._groups[group.id] = group
        heapq.heappush(self._pending, group.id)
        return group

    def lease(self, worker: str) -> Group | None:
        """The oldest PENDING group, now RUNNING on `worker`; None when none may be leased."""
        if not self.admits(self.version.number):
            return None
        while self._pending:
            group = self._groups.get(heapq.heappop(self._pending))
            if group is not None and group.state == "PENDING":
                return self._move(group, "RUNNING", lease=group.lease + 1, worker=worker)
        return None

    def generated(self, group: Group, payload: Any, meta: GroupMeta) -> Group | None:
        """RUNNING → GENERATED; None when the result is late: another lease, or tokens of an undone version."""
        current = self._current(group, "RUNNING")
        if current is None:
            return None
        if self._undone(meta):
            self._return(current, "undone_version")
            return None
        return self._move(current, "GENERATED", payload=payload, meta=meta)

    def scored(self, group: Group, payload: Any, meta: GroupMeta) -> Group | None:
        """GENERATED → SCORED; None when the result is late."""
        current = self._current(group, "GENERATED")
        return current and self._move(current, "SCORED", payload=payload, meta=meta)

    def ready(self, group: Group) -> Group | None:
        """SCORED → READY; None when late."""
        current = self._current(group, "SCORED")
        return current and self._move(current, "READY")

    def drop(self, group: Group, reason: DropReason) -> Group | None:
        """Any state before CONSUMED → DROPPED; the payload is released. None when late."""
        current = self._current(group, "PENDING", "RUNNING", "GENERATED", "SCORED", "READY")
        return current and self._drop(current, reason)

    def failed(self, group: Group, error: str) -> Group | None:
        """The try went wrong: back to PENDING, or DROPPED("poisoned") after `max_tries`. None when late."""
        current = self._current(group, "RUNNING", "GENERATED", "SCORED")
        if current is None:
            return None
        if current.tries + 1 >= self.max_tries:
            return self._drop(current, "poisoned", tries=current.tries + 1, error=error)
        return self._return(current, "failed", tries=current.tries + 1, error=error)

    def payload_lost(self, group: Group) -> Group | None:
        """The node that held the rows is gone: back to PENDING, no try used. None when late.

        A CONSUMED group stays consumed; should a rollback undo its step, it returns to PENDING.
        """
        current = self._current(group, "GENERATED", "SCORED", "READY", "CONSUMED")
        if current is None or (group.payload is not None and group.payload is not current.payload):
            return None  # late, or it has other rows by now
        if current.state == "CONSUMED":
            return self._move(current, "CONSUMED", payload=None)
        return self._return(current, "payload_lost")

    def worker_lost(self, worker: str) -> list[Group]:
        """A rollout worker died: its RUNNING groups return to PENDING, no try used."""
        ids = sorted(self._running.get(worker, ()))
        return [self._return(self._groups[id], "worker_lost") for id in ids]

    # --- what happens to all of them

    def take_step(self) -> list[Group] | None:
        """The groups of the next learner step, now CONSUMED: oldest version first, then by id.

        Stale groups are dropped first. None while fewer than `groups_per_step` are READY.
        """
        limit = self.version.number - self.max_staleness
        while self._ready and (self._ready[0][0] < limit or self._next_ready() is None):
            stale = self._next_ready()
            heapq.heappop(self._ready)
            if stale is not None:
                self._tally("stale", stale, 1)
                self._drop(stale, "stale")
        if self._counts["READY"] < self.groups_per_step:
            return None
        taken: list[Group] = []
        while len(taken) < self.groups_per_step:
            group = self._next_ready()
            heapq.heappop(self._ready)
            if group is not None:
                self._tally("consumed", group, 1)
                taken.append(self._move(group, "CONSUMED", step=self.step))
        self._consumed[self.step] = [group.id for group in taken]
        self.step += 1
        return taken

    def published(self, version: Version) -> bool:
        """New weights are out; False for the late message of an undone attempt."""
        if version.attempt < self.version.attempt:
            return False
        if version.attempt > self.version.attempt or version.number <= self.version.number:
            raise ValueError(f"{version} cannot follow {self.version}")
        self.version = version
        return True

    def committed(self, step: int) -> int:
        """A checkpoint that covers the steps before `step` is safe: their groups are released (count returned)."""
        if step > self.step:
            raise ValueError(f"step {step} cannot be committed: only {self.step} were taken")
        released = 0
        for covered in [s for s in self._consumed if s < step]:
            for id in self._consumed.pop(covered):
                del self._groups[id]
                released += 1
        self.committed_step = max(self.committed_step, step)
        return released

    def rollback(self, version: Version, step: int) -> None:
        """The learner is back at `step`, as a new attempt whose weights are `version`.

        Groups consumed at or after `step` become READY again; groups with tokens of versions that are now
        undone lose them; running generations are to be aborted by the caller, and their groups are PENDING.
        Raises ValueError for an attempt that is not new or a step whose payloads are released.
        """
        if version.attempt <= self.version.attempt:
            raise ValueError(f"rollback to {version}: attempt {self.version.attempt} is running")
        if not self.committed_step <= step <= self.step:
            raise ValueError(f"rollback to step {step}: outside {self.committed_step} … {self.step}")
        self._limits = {attempt: min(last, version.number) for attempt, last in self._limits.items()}
        self._limits[self.version.attempt] = version.number
        self.version, self.step = version, step
        for undone in [s for s in self._consumed if s >= step]:
            del self._consumed[undone]
        for group in sorted(self._groups.values(), key=lambda group: group.id):
            self._roll_back(group)

    def _roll_back(self, group: Group) -> None:
        if group.state == "RUNNING":
            self._return(group, "aborted")
        elif group.meta is None or (group.step is not None and group.step < self.step):
            return
        else:
            again = group.state == "CONSUMED"
            if again:
                self._tally("consumed", group, -1)
            if self._undone(group.meta):
                self._return(group, "undone_version")
            elif again and group.payload is None:
                self._return(group, "payload_lost")
            elif again:
                self._move(group, "READY", step=None)

    def cancel(self) -> int:
        """The training is over: every group that is not CONSUMED is DROPPED("cancelled") (count returned)."""
        alive = [group for group in self._groups.values() if group.state != "CONSUMED"]
        for group in alive:
            self._drop(group, "cancelled")
        return len(alive)

    # --- checkpoint

    def snapshot(self, step: int | None = None) -> dict[str, Any]:
        """JSON-able state for a checkpoint that covers the steps before `step` (None: what is committed).

        RUNNING, GENERATED and SCORED are written as PENDING, groups that the checkpoint covers only counted,
        payloads left out: `payload_ids` lists the groups whose payload the checkpoint keeps under their id.
        """
        covered = self.committed_step if step is None else step
        kept = [group for _, group in sorted(self._groups.items()) if group.step is None or group.step >= covered]
        groups = [self._to_json(group) for group in kept]
        return {
            "groups_per_step": self.groups_per_step,
            "version": [self.version.attempt, self.version.number],
            "limits": sorted(self._limits.items()),
            "step": self.step,
            "committed_step": covered,
            "admitted": self.admitted,
            "consumed": self._counts["CONSUMED"],
            "dropped": dict(self._drops),
            "events": dict(self.events),
            "lengths": {name: list(tally) for name, tally in self._lengths.items()},
            "payload_ids": [group.id for group in kept if group.state in _KEPT and group.payload is not None],
            "groups": groups,
        }

    @classmethod
    def restore(
        cls,
        snapshot: Mapping[str, Any],
        payloads: Mapping[int, Any],
        *,
        max_staleness: int,
        groups_per_step: int,
        max_tries: int = 3,
    ) -> Ledger:
        """The ledger of a snapshot; call `rollback` with a new attempt before leasing goes on.

        READY groups without an entry in `payloads` return to PENDING. Raises ValueError when
        `groups_per_step` is not the run's: lock 1 counts in it.
        """
        if groups_per_step != snapshot["groups_per_step"]:
            raise ValueError(
                f"groups_per_step: {groups_per_step}, but the run was started with {snapshot['groups_per_step']}; "
                "a resumed run keeps it"
            )
        ledger = cls(
            max_staleness=max_staleness,
            groups_per_step=groups_per_step,
            max_tries=max_tries,
            version=Version(*snapshot["version"]),
        )
        ledger._limits = dict(snapshot["limits"])
        ledger.step, ledger.committed_step = snapshot["step"], snapshot["committed_step"]
        ledger.admitted = snapshot["admitted"]
        ledger.events = Counter(snapshot["events"])
        ledger._drops = Counter(snapshot["dropped"])
        ledger._lengths = {name: list(tally) for name, tally in snapshot["lengths"].items()}
        ledger._counts.update(CONSUMED=snapshot["consumed"], DROPPED=ledger._drops.total())
        for raw in snapshot["groups"]:
            meta = raw["meta"] and GroupMeta.from_json(raw["meta"])
            group = Group(**{**raw, "meta": meta, "payload": payloads.get(raw["id"])})
            ledger._load(group)
        return ledger

    def _load(self, group: Group) -> None:
        self._groups[group.id] = group
        if group.state == "CONSUMED":
            assert group.step is not None
            self._consumed.setdefault(group.step, []).append(group.id)
            return
        self._counts[group.state] += 1
        self._enqueue(group)
        if group.state == "READY" and group.payload is None:
            self._return(group, "payload_lost")

    @staticmethod
    def _to_json(group: Group) -> dict[str, Any]:
        raw: dict[str, Any] = {
            name: getattr(group, name) for name in ("id", "sample", "seed", "lease", "tries", "error")
        }
        if group.state not in _KEPT or group.meta is None:
            return raw | {"state": "PENDING", "step": None, "meta": None}
        return raw | {"state": group.state, "step": group.step, "meta": group.meta.to_json()}

    # --- the only places where a state changes

    def _move(self, group: Group, state: State, **changes: Any) -> Group:
        if group.worker is not None:
            running = self._running[group.worker]
            running.remove(group.id)
            if not running:
                del self._running[group.worker]
            changes["worker"] = None
        moved = replace(group, state=state, **changes)
        self._counts[group.state] -= 1
        self._counts[state] += 1
        if state == "DROPPED":
            del self._groups[group.id]
            return moved
        self._groups[group.id] = moved
        self._enqueue(moved)
        return moved

    def _enqueue(self, group: Group) -> None:
        if group.state == "PENDING":
            heapq.heappush(self._pending, group.id)
        elif group.state == "READY":
            assert group.meta is not None
            heapq.heappush(self._ready, (group.meta.oldest, group.id, group.lease))
        elif group.state == "RUNNING":
            assert group.worker is not None
            self._running.setdefault(group.worker, set()).add(group.id)

    def _drop(self, group: Group, reason: DropReason, **changes: Any) -> Group:
        self._drops[reason] += 1
        return self._move(group, "DROPPED", dropped=reason, payload=None, **changes)

    def _return(self, group: Group, reason: ReturnReason, **changes: Any) -> Group:
        self.events[reason] += 1
        return self._move(group, "PENDING", payload=None, meta=None, step=None, **changes)

    # --- small questions

    def _current(self, ticket: Group, *states: State) -> Group | None:
        group = self._groups.get(ticket.id)
        if group is None or group.lease != ticket.lease or group.state not in states:
            self.events["late_result"] += 1
            return None
        return group

    def _next_ready(self) -> Group | None:
        _, id, lease = self._ready[0]
        group = self._groups.get(id)
        return group if group is not None and group.state == "READY" and group.lease == lease else None

    def _undone(self, meta: GroupMeta) -> bool:
        return any(
            version.attempt != self.version.attempt and version.number > self._limits.get(version.attempt, -1)
            for version in meta.versions
        )

    def _tally(self, name: str, group: Group, sign: int) -> None:
        assert group.meta is not None
        tally = self._lengths[name]
        tally[0] += sign * len(group.meta.lengths)
        tally[1] += sign * group.meta.tokens
