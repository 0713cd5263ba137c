"""The ledger keeps its promises: both locks, nothing lost or counted twice, and never a deadlock."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rporec.engine.types import Version
from rporec.rl.ledger import Group, Ledger
from rporec.rl.rollout_schema import GroupMeta


def meta(group: int, *versions: Version, lengths: tuple[int, ...] = (4, 6)) -> GroupMeta:
    return GroupMeta(group, sum(lengths), lengths, tuple(sorted(versions)), format=1.0)


def finish(ledger: Ledger, group: Group, *versions: Version, lengths: tuple[int, ...] = (4, 6)) -> Group:
    """A RUNNING group becomes READY."""
    facts = meta(group.id, *(versions or (ledger.version,)), lengths=lengths)
    assert ledger.generated(group, f"rows {group.id}", facts)
    assert ledger.scored(group, f"scored {group.id}", facts)
    done = ledger.ready(group)
    assert done is not None
    return done


def fill(ledger: Ledger, worker: str = "w") -> list[Group]:
    """Admit and lease all that lock 1 lets in."""
    while ledger.capacity():
        ledger.admit(sample=ledger.admitted, seed=1)
    leased = []
    while (group := ledger.lease(worker)) is not None:
        leased.append(group)
    return leased


def ledger_of(max_staleness: int = 0, groups_per_step: int = 2, max_tries: int = 3) -> Ledger:
    return Ledger(max_staleness=max_staleness, groups_per_step=groups_per_step, max_tries=max_tries)


def test_on_policy_admits_one_step_of_groups_for_each_version_and_consumes_them_together():
    ledger = ledger_of(max_staleness=0, groups_per_step=3)
    for number in range(4):
        groups = fill(ledger)
        assert len(groups) == 3
        for group in reversed(groups):
            assert ledger.take_step() is None
            finish(ledger, group)
        taken = ledger.take_step()
        assert [group.id for group in taken] == [group.id for group in groups]
        assert ledger.capacity() == 0
        assert ledger.published(Version(0, number + 1))


def test_admission_runs_max_staleness_steps_ahead():
    ledger = ledger_of(max_staleness=2, groups_per_step=4)
    assert len(fill(ledger)) == 12
    with pytest.raises(ValueError, match="no capacity"):
        ledger.admit(0, 0)


def test_a_version_that_lags_may_sample_only_what_will_not_be_stale():
    """Of 4 groups in flight at version 1, the last 2 are consumed at version 2: not with tokens of version 0."""
    ledger = ledger_of(max_staleness=1, groups_per_step=2)
    for group in fill(ledger)[:2]:
        finish(ledger, group)
    ledger.take_step()
    ledger.published(Version(0, 1))
    assert not ledger.admits(0)
    assert ledger.admits(1)
    assert len(fill(ledger)) == 2
    assert not ledger.admits(1)


def test_oldest_version_is_consumed_first_and_ties_go_by_id():
    ledger = ledger_of(max_staleness=1, groups_per_step=2)
    first = fill(ledger)
    for group in first[2:]:
        finish(ledger, group)
    assert [group.id for group in ledger.take_step()] == [2, 3]
    ledger.published(Version(0, 1))
    later = fill(ledger)
    finish(ledger, later[0])
    finish(ledger, first[1], Version(0, 0), Version(0, 1))
    finish(ledger, first[0], Version(0, 1))
    assert [group.id for group in ledger.take_step()] == [1, 0]


def test_a_group_with_one_token_too_old_is_dropped_counted_and_replaced():
    ledger = ledger_of(max_staleness=0, groups_per_step=2)
    slow, other = fill(ledger)
    ledger.published(Version(0, 1))
    finish(ledger, slow, Version(0, 0), Version(0, 1), lengths=(90, 110))
    finish(ledger, other)
    room = ledger.capacity()
    assert ledger.take_step() is None
    assert ledger.counts()["DROPPED"] == {"stale": 1}
    assert ledger.capacity() == room + 1
    for group in fill(ledger):
        finish(ledger, group)
    assert len(ledger.take_step()) == 2
    assert ledger.lengths() == {"stale": 100.0, "consumed": 5.0}


def test_a_lost_worker_costs_no_try_and_only_its_own_groups():
    ledger = ledger_of(max_staleness=0, groups_per_step=3, max_tries=1)
    for sample in range(3):
        ledger.admit(sample, 0)
    a, b, c = ledger.lease("a"), ledger.lease("b"), ledger.lease("a")
    returned = ledger.worker_lost("a")
    assert [(group.id, group.tries) for group in returned] == [(a.id, 0), (c.id, 0)]
    assert ledger.worker_lost("a") == []
    assert ledger.group(b.id).state == "RUNNING"
    again = ledger.lease("b")
    assert (again.id, again.sample, again.seed) == (a.id, a.sample, a.seed)
    assert ledger.generated(a, "late", meta(a.id, Version(0, 0))) is None
    assert ledger.events == {"worker_lost": 2, "late_result": 1}
    assert ledger.generated(again, "in time", meta(a.id, Version(0, 0))).payload == "in time"


def test_a_group_that_keeps_failing_is_poisoned():
    ledger = ledger_of(groups_per_step=1, max_tries=2)
    group = ledger.admit(0, 0) and ledger.lease("a")
    assert ledger.failed(group, "boom").state == "PENDING"
    assert ledger.failed(group, "said twice") is None
    group = ledger.lease("a")
    final = ledger.failed(group, "boom")
    assert (final.state, final.dropped, final.tries, final.error) == ("DROPPED", "poisoned", 2, "boom")
    assert ledger.counts()["DROPPED"] == {"poisoned": 1}
    assert ledger.capacity() == 1


def test_scores_of_an_earlier_lease_are_refused():
    ledger = ledger_of(groups_per_step=1)
    ledger.admit(0, 0)
    old = ledger.lease("a")
    ledger.generated(old, "rows", meta(0, Version(0, 0)))
    assert ledger.payload_lost(old).state == "PENDING"
    new = ledger.lease("a")
    ledger.generated(new, "new rows", meta(0, Version(0, 0)))
    assert ledger.scored(old, "old scores", meta(0, Version(0, 0))) is None
    assert ledger.group(0).payload == "new rows"


def test_commit_releases_payloads_and_only_of_covered_steps():
    ledger = ledger_of(max_staleness=0, groups_per_step=2)
    for number in range(2):
        for group in fill(ledger):
            finish(ledger, group)
        ledger.take_step()
        ledger.published(Version(0, number + 1))
    assert ledger.committed(1) == 2
    assert [ledger.group(id) is None for id in range(4)] == [True, True, False, False]
    assert ledger.counts()["CONSUMED"] == 4
    with pytest.raises(ValueError, match="cannot be committed"):
        ledger.committed(3)


def test_rollback_returns_uncommitted_groups_and_empties_those_of_undone_versions():
    ledger = ledger_of(max_staleness=1, groups_per_step=2)
    early = fill(ledger)
    for group in early:
        finish(ledger, group)
    ledger.take_step()
    ledger.committed(1)
    ledger.published(Version(0, 1))
    ledger.take_step()  # groups 2, 3: sampled by version 0
    ledger.published(Version(0, 2))
    late = fill(ledger)
    finish(ledger, late[0])
    ledger.rollback(Version(1, 1), step=1)
    assert [ledger.group(id).state for id in (2, 3)] == ["READY", "READY"]
    assert [ledger.group(group.id).state for group in late] == ["PENDING"] * 4
    assert ledger.events == {"undone_version": 1, "aborted": 3}
    assert ledger.group(late[0].id).tries == 0
    assert ledger.published(Version(0, 3)) is False
    assert ledger.version == Version(1, 1)
    assert [group.id for group in ledger.take_step()] == [2, 3]


def test_a_worker_still_on_undone_weights_is_refused_even_with_a_new_lease():
    ledger = ledger_of(groups_per_step=1)
    finish(ledger, *fill(ledger))
    ledger.take_step()
    ledger.published(Version(0, 1))
    ledger.rollback(Version(1, 0), step=0)
    finish_first = ledger.take_step()
    assert [group.id for group in finish_first] == [0]
    ledger.published(Version(1, 1))
    group = fill(ledger)[0]
    assert ledger.generated(group, "rows", meta(group.id, Version(0, 1))) is None
    assert ledger.group(group.id).state == "PENDING"
    group = ledger.lease("w")
    assert ledger.generated(group, "rows", meta(group.id, Version(0, 0)))  # a version that both attempts share


def test_a_second_rollback_that_goes_further_back_undoes_the_first_attempt_too():
    ledger = ledger_of(max_staleness=0, groups_per_step=1)
    for number in range(2):
        finish(ledger, *fill(ledger))
        ledger.take_step()
        ledger.published(Version(0, number + 1))
    ledger.rollback(Version(1, 1), step=1)
    ledger.rollback(Version(2, 0), step=0)
    (group,) = ledger.take_step()
    assert group.id == 0
    ledger.published(Version(2, 1))
    group = fill(ledger)[0]
    assert ledger.generated(group, "rows", meta(group.id, Version(0, 1))) is None


def test_after_a_rollback_groups_of_later_versions_wait_for_them():
    ledger = ledger_of(max_staleness=0, groups_per_step=2)
    for number in range(2):
        for group in fill(ledger):
            finish(ledger, group)
        ledger.take_step()
        ledger.published(Version(0, number + 1))
    ledger.rollback(Version(1, 0), step=0)
    assert ledger.counts()["PENDING"] == 2  # those sampled by version 1
    assert ledger.lease("w") is None  # leased now they would be stale when their step comes
    assert [group.id for group in ledger.take_step()] == [0, 1]
    ledger.published(Version(1, 1))
    assert [group.id for group in fill(ledger)] == [2, 3]


def test_a_lost_payload_of_a_consumed_group_matters_only_if_its_step_is_undone():
    ledger = ledger_of(groups_per_step=1)
    finish(ledger, *fill(ledger))
    (group,) = ledger.take_step()
    assert ledger.payload_lost(group).state == "CONSUMED"
    snapshot = json.loads(json.dumps(ledger.snapshot()))
    assert snapshot["payload_ids"] == []
    restored = Ledger.restore(snapshot, {}, max_staleness=0, groups_per_step=1)
    for one in (ledger, restored):
        one.rollback(Version(1, 0), step=0)
        assert one.group(group.id).state == "PENDING"


def test_snapshot_is_json_and_restores_what_a_checkpoint_can_keep():
    ledger = ledger_of(max_staleness=2, groups_per_step=2)
    groups = fill(ledger)
    for group in groups[:4]:
        finish(ledger, group)
    ledger.take_step()
    ledger.generated(groups[4], "rows", meta(4, Version(0, 0)))
    ledger.drop(groups[5], "flat")
    snapshot = json.loads(json.dumps(ledger.snapshot(step=0)))
    assert snapshot["payload_ids"] == [0, 1, 2, 3]
    payloads = {id: f"read back {id}" for id in (0, 1, 2)}
    again = Ledger.restore(snapshot, payloads, max_staleness=2, groups_per_step=2)
    states = [group and group.state for group in map(again.group, range(6))]
    assert states == ["CONSUMED", "CONSUMED", "READY", "PENDING", "PENDING", None]  # 3: its payload was not there
    assert again.group(2).payload == "read back 2"
    assert again.counts()["DROPPED"] == {"flat": 1}
    covered = Ledger.restore(ledger.snapshot(step=1), payloads, max_staleness=2, groups_per_step=2)
    assert covered.group(0) is None
    assert covered.counts()["CONSUMED"] == 2
    with pytest.raises(ValueError, match="groups_per_step: 3"):
        Ledger.restore(snapshot, payloads, max_staleness=2, groups_per_step=3)


def test_versions_go_up_and_rollbacks_need_a_new_attempt():
    ledger = ledger_of()
    ledger.published(Version(0, 1))
    for version in (Version(0, 1), Version(1, 2)):
        with pytest.raises(ValueError, match="cannot follow"):
            ledger.published(version)
    with pytest.raises(ValueError, match="is running"):
        ledger.rollback(Version(0, 0), step=0)
    with pytest.raises(ValueError, match="outside"):
        ledger.rollback(Version(1, 0), step=1)


def test_twenty_thousand_groups_a_second_pass():
    ledger = ledger_of(max_staleness=3, groups_per_step=256)
    facts: dict[int, GroupMeta] = {}
    start, steps = time.process_time(), 20
    for number in range(steps):
        for group in fill(ledger):
            one = facts.setdefault(number, meta(0, ledger.version))
            ledger.generated(group, None, one)
            ledger.scored(group, None, one)
            ledger.ready(group)
        assert ledger.take_step()
        ledger.published(Version(0, number + 1))
        ledger.committed(number + 1)
    rate = steps * 256 / (time.process_time() - start)
    assert rate > 5_000, f"{rate:.0f} groups/s"  # a slow shared machine; about 30,000 on a free core


class LedgerMachine(RuleBasedStateMachine):
    """Random interleavings of a controller's life, beside an independent book of what must be true."""

    @initialize(max_staleness=st.integers(0, 2), groups_per_step=st.integers(1, 3), max_tries=st.integers(1, 2))
    def start(self, max_staleness: int, groups_per_step: int, max_tries: int) -> None:
        self.settings = {
            "max_staleness": max_staleness,
            "groups_per_step": groups_per_step,
            "max_tries": max_tries,
        }
        self.ledger = Ledger(**self.settings)
        self.attempt = 0
        self.state: dict[int, str] = {}
        self.identity: dict[int, tuple[int, int]] = {}
        self.versions: dict[int, set[Version]] = {}  # tokens that a group holds
        self.consumed_at: dict[int, int] = {}
        self.tickets: dict[int, Group] = {}  # the current lease of each group in flight
        self.stale_tickets: list[Group] = []
        self.leased_at: dict[int, Version] = {}
        self.alive = {Version(0, 0)}  # published and not undone
        self.undone: set[Version] = set()
        self.gone: set[int] = set()  # consumed groups whose payload is lost
        self.rolled_back = False
        self.commit()

    # --- the book

    @property
    def bound(self) -> int:
        per_step, staleness = self.settings["groups_per_step"], self.settings["max_staleness"]
        return (staleness + self.ledger.version.number + 1) * per_step

    def number(self, *states: str) -> int:
        return sum(state in states for state in self.state.values())

    def unlease(self, id: int) -> None:
        if id in self.tickets:
            self.stale_tickets.append(self.tickets.pop(id))
            del self.stale_tickets[:-20]

    def back(self, id: int) -> None:
        self.unlease(id)
        self.versions.pop(id, None)
        self.state[id] = "PENDING"

    def in_state(self, *states: str) -> list[int]:
        return [id for id in self.tickets if self.state[id] in states]

    def draw(self, data: st.DataObject, *states: str) -> Group | None:
        ids = self.in_state(*states)
        return self.tickets[data.draw(st.sampled_from(ids))] if ids else None

    # --- the life

    @rule()
    def admit(self) -> None:
        fits = self.number("PENDING", "RUNNING", "GENERATED", "SCORED", "READY", "CONSUMED") < self.bound
        assert (self.ledger.capacity() > 0) == fits
        if fits:
            group = self.ledger.admit(sample=7 * len(self.state), seed=len(self.state))
            assert group.id not in self.state
            self.state[group.id] = "PENDING"
            self.identity[group.id] = (group.sample, group.seed)

    @rule(worker=st.sampled_from("ab"))
    def lease(self, worker: str) -> None:
        fits = self.number("RUNNING", "GENERATED", "SCORED", "READY", "CONSUMED") < self.bound
        group = self.ledger.lease(worker)
        assert (group is not None) == (fits and self.number("PENDING") > 0)
        if group is not None:
            assert group.id == min(id for id, state in self.state.items() if state == "PENDING")
            assert (group.sample, group.seed) == self.identity[group.id]
            self.state[group.id] = "RUNNING"
            self.tickets[group.id] = group
            self.leased_at[group.id] = self.ledger.version

    @rule(data=st.data(), in_flight=st.booleans())
    def generated(self, data: st.DataObject, in_flight: bool) -> None:
        if group := self.draw(data, "RUNNING"):
            self.complete(group, in_flight)

    def complete(self, group: Group, in_flight: bool) -> None:
        since = self.leased_at[group.id]
        versions = {self.ledger.version, since} if in_flight else {since}
        assert self.ledger.generated(group, f"rows {group.id}", meta(group.id, *versions))
        self.state[group.id], self.versions[group.id] = "GENERATED", versions

    @precondition(lambda self: self.undone)
    @rule(data=st.data())
    def generated_by_undone_weights(self, data: st.DataObject) -> None:
        self.lease("a")
        if group := self.draw(data, "RUNNING"):
            version = data.draw(st.sampled_from(sorted(self.undone)))
            assert self.ledger.generated(group, "rows", meta(group.id, version, self.ledger.version)) is None
            self.back(group.id)

    @rule(data=st.data())
    def scored(self, data: st.DataObject) -> None:
        if group := self.draw(data, "GENERATED"):
            assert self.ledger.scored(group, f"scored {group.id}", meta(group.id, *self.versions[group.id]))
            self.state[group.id] = "SCORED"

    @rule(data=st.data())
    def ready(self, data: st.DataObject) -> None:
        if group := self.draw(data, "SCORED"):
            assert self.ledger.ready(group)
            self.state[group.id] = "READY"

    @rule()
    def late_results(self) -> None:
        for group in self.stale_tickets:
            facts = meta(group.id, *self.alive)
            assert self.ledger.generated(group, "late", facts) is None
            assert self.ledger.scored(group, "late", facts) is None
            assert self.ledger.ready(group) is None
            assert self.ledger.failed(group, "late") is None

    @rule(data=st.data())
    def failed(self, data: st.DataObject) -> None:
        if group := self.draw(data, "RUNNING", "GENERATED", "SCORED"):
            after = self.ledger.failed(group, "boom")
            self.back(group.id)
            self.state[group.id] = after.state
            assert after.state == "PENDING" or after.tries == self.settings["max_tries"]

    @rule(data=st.data())
    def dropped(self, data: st.DataObject) -> None:
        if group := self.draw(data, "RUNNING", "SCORED", "READY"):
            assert self.ledger.drop(group, "flat")
            self.unlease(group.id)
            self.state[group.id] = "DROPPED"

    @rule(data=st.data())
    def payload_lost(self, data: st.DataObject) -> None:
        if group := self.draw(data, "GENERATED", "SCORED", "READY"):
            assert self.ledger.payload_lost(group)
            self.back(group.id)

    @rule(data=st.data())
    def payload_of_a_consumed_group_lost(self, data: st.DataObject) -> None:
        ids = [id for id in self.in_state("CONSUMED") if self.consumed_at[id] >= self.ledger.committed_step]
        if ids:
            id = data.draw(st.sampled_from(ids))
            assert self.ledger.payload_lost(self.tickets[id]).state == "CONSUMED"
            self.gone.add(id)

    @rule(worker=st.sampled_from("ab"))
    def worker_lost(self, worker: str) -> None:
        expected = [id for id in self.in_state("RUNNING") if self.tickets[id].worker == worker]
        assert [group.id for group in self.ledger.worker_lost(worker)] == sorted(expected)
        for id in expected:
            self.back(id)

    @precondition(lambda self: self.ledger.step == self.ledger.version.number)
    @rule()
    def take_step(self) -> None:
        self.try_step()

    def try_step(self) -> bool:
        oldest = self.ledger.version.number - self.settings["max_staleness"]
        fresh = {}
        for id in self.in_state("READY"):
            age = min(version.number for version in self.versions[id])
            if age >= oldest:
                fresh[id] = age
            else:
                self.unlease(id)
                self.state[id] = "DROPPED"
        taken = self.ledger.take_step()
        size = self.settings["groups_per_step"]
        assert (taken is not None) == (len(fresh) >= size)
        for group in taken or ():
            assert group.payload == f"scored {group.id}"
            assert self.versions[group.id] <= self.alive
            assert (group.sample, group.seed) == self.identity[group.id]
            self.state[group.id] = "CONSUMED"
            self.consumed_at[group.id] = group.step
        if taken is not None:
            assert [group.id for group in taken] == sorted(fresh, key=lambda id: (fresh[id], id))[:size]
        return taken is not None

    @precondition(lambda self: self.ledger.step > self.ledger.version.number)
    @rule()
    def publish(self) -> None:
        version = Version(self.ledger.version.attempt, self.ledger.version.number + 1)
        assert self.ledger.published(version)
        self.alive.add(version)

    @rule()
    def commit(self) -> None:
        step = self.ledger.version.number
        snapshot = json.loads(json.dumps(self.ledger.snapshot(step)))
        self.checkpoint = {
            "step": step,
            "snapshot": snapshot,
            "payloads": {id: self.ledger.group(id).payload for id in snapshot["payload_ids"]},
            "state": dict(self.state),
            "versions": {id: set(versions) for id, versions in self.versions.items()},
            "consumed_at": dict(self.consumed_at),
            "gone": set(self.gone),
        }
        self.ledger.committed(step)
        assert self.ledger.snapshot()["payload_ids"] == snapshot["payload_ids"]

    @rule()
    def learner_lost(self) -> None:
        self.roll_back()

    @rule()
    def controller_lost(self) -> None:
        """Restarted from the committed checkpoint; what was admitted since never happened."""
        saved = self.checkpoint
        self.ledger = Ledger.restore(saved["snapshot"], saved["payloads"], **self.settings)
        self.state = {
            id: "PENDING" if state in ("RUNNING", "GENERATED", "SCORED") else state
            for id, state in saved["state"].items()
        }
        self.versions = {id: set(versions) for id, versions in saved["versions"].items()}
        self.consumed_at = dict(saved["consumed_at"])
        self.gone = set(saved["gone"])
        self.tickets = {
            id: self.ledger.group(id)
            for id, state in self.state.items()
            if state == "READY" or (state == "CONSUMED" and self.consumed_at[id] >= saved["step"])
        }
        self.stale_tickets = []
        again = json.loads(json.dumps(self.ledger.snapshot()))
        assert again == saved["snapshot"]
        self.roll_back()

    def roll_back(self) -> None:
        self.attempt += 1
        step = self.checkpoint["step"]
        self.undone |= {version for version in self.alive if version.number > step}
        self.alive = (self.alive - self.undone) | {Version(self.attempt, step)}
        self.ledger.rollback(Version(self.attempt, step), step)
        for id, state in list(self.state.items()):
            consumed_again = state == "CONSUMED" and self.consumed_at[id] >= step
            if state == "RUNNING":
                self.back(id)
            elif consumed_again or state in ("GENERATED", "SCORED", "READY"):
                if id in self.gone or not self.versions[id] <= self.alive:
                    self.back(id)
                elif consumed_again:
                    self.state[id] = "READY"
        self.gone = set()
        self.rolled_back = True

    @rule(steps=st.integers(1, 4), in_flight=st.booleans(), slow=st.sets(st.integers(0, 2), max_size=2))
    def a_learner_that_waits_gets_its_steps(self, steps: int, in_flight: bool, slow: set[int]) -> None:
        for _ in range(steps):
            self.wait_for_step(in_flight, slow)

    def wait_for_step(self, in_flight: bool, slow: set[int]) -> None:
        """Groups whose id modulo 3 is in `slow` are held back until nothing else can make the step."""
        if self.ledger.step > self.ledger.version.number:
            self.publish()
        for held in (slow, slow, (), ()):  # twice: what is under way, then what replaces the stale
            while self.ledger.capacity():
                self.admit()
            for _ in range(self.number("PENDING")):
                self.lease("ab"[len(self.tickets) % 2])
            for id in self.in_state("RUNNING"):
                if id % 3 not in held:
                    self.complete(self.tickets[id], in_flight)
            for id in self.in_state("GENERATED"):
                assert self.ledger.scored(self.tickets[id], f"scored {id}", meta(id, *self.versions[id]))
                self.state[id] = "SCORED"
            for id in self.in_state("SCORED"):
                assert self.ledger.ready(self.tickets[id])
                self.state[id] = "READY"
            if self.try_step():
                return
        raise AssertionError(f"deadlock: {self.ledger.counts()}")

    # --- what holds at any time

    @invariant()
    def counts_add_up(self) -> None:
        counts = self.ledger.counts()
        dropped = sum(counts.pop("DROPPED").values())
        assert counts == {state: self.number(state) for state in counts}
        assert dropped == self.number("DROPPED")
        assert sum(counts.values()) + dropped == self.ledger.admitted == len(self.state)

    @invariant()
    def lock_one_holds(self) -> None:
        if not self.rolled_back:
            assert self.ledger.leased + self.number("CONSUMED") <= self.bound

    @invariant()
    def no_undone_token_is_kept(self) -> None:
        for id in self.in_state("GENERATED", "SCORED", "READY"):
            assert self.versions[id] <= self.alive


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
