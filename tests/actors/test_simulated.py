"""The real controller, ledger and checkpoints, driven by coroutines in simulated time."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors import checkpoints
from actors.controller import Controller
from actors.simulated import (
    TOKENS,
    Consumed,
    Latency,
    SimulatedPlacement,
    SimulatedRecipe,
    SimulatedReward,
    SimulatedRollout,
    learn,
    on_virtual_clock,
)
from rporec.config import Config, parse_config
from rporec.files import read_json, read_lines
from rporec.run import Run


def config(**changes: Any) -> Config:
    small = {"groups_per_step": 8, "steps": 12, "checkpoint_every": 3, "rollout_workers": 4, "reward_workers": 2}
    engine = {"max_num_seqs": 16}
    rest = {"engine": engine, "max_staleness": 1, "rl": {"validate_every": 1000}, "promotion": {"automatic": False}}
    return parse_config({**small, **rest, **changes})


class Simulation:
    """One controller and its learner on a run folder; a second one on the same folder is a resumed run."""

    def __init__(self, folder: Path, settings: Config, seed: int = 0, **latencies: Any) -> None:
        waits = {"rollout_latency": Latency(1.0, 0.5), "reward_latency": Latency(0.1), "start": 5.0, **latencies}
        self.run, self.config = Run(folder), settings
        self.placement = SimulatedPlacement(seed=seed, **waits)
        self.seen: list[Consumed] = []
        self.rng = np.random.default_rng(seed)
        self.controller = Controller(self.run, settings, self.placement, SimulatedRecipe())

    async def until(self, time: float | None = None, learner: float = 1.0) -> dict[str, Any]:
        """Go on to the end, or until `time`, at which everything stops as if killed."""
        started = asyncio.create_task(self.controller.start())
        await started
        learning = asyncio.create_task(learn(self.controller, Latency(learner, 0.2), self.rng, seen=self.seen.append))
        if time is None:
            await learning
            await self.controller.stop()
            return self.controller._status()
        await asyncio.wait([learning], timeout=time)
        for task in (learning, self.controller.main, *self.controller.training.tasks):
            if task is not None:
                task.cancel()
        await asyncio.sleep(0)
        return self.controller._status()


def assert_whole(status: dict[str, Any], steps: int, groups: int) -> None:
    counts = status["groups"]
    assert status["state"] == "FINISHED"
    assert counts["CONSUMED"] == steps * groups
    assert all(counts[state] == 0 for state in ("PENDING", "RUNNING", "GENERATED", "SCORED", "READY"))
    assert sum(counts["DROPPED"].values()) + counts["CONSUMED"] == status["admitted"]


def flat_but(monkeypatch: pytest.MonkeyPatch, learnable: int) -> None:
    """One group in so many, by id, has rewards that differ."""
    score = SimulatedReward.score

    def judged(self: SimulatedReward, *payloads: Any) -> tuple[Any, ...]:
        for rows in payloads:
            rows.meta = replace(rows.meta, flat=rows.meta.group % learnable != 0)
        return score(self, *payloads)

    monkeypatch.setattr(SimulatedReward, "score", judged)


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("staleness", [0, 1])
def test_dynamic_sampling_has_others_take_the_place_of_flat_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, staleness: int, dynamic: bool
) -> None:
    flat_but(monkeypatch, 3)

    async def work() -> None:
        settings = config(max_staleness=staleness, rl={"validate_every": 1000, "dynamic_sampling": dynamic})
        simulation = Simulation(tmp_path, settings)
        status = await simulation.until()
        assert_whole(status, 12, 8)
        consumed = [group for step in simulation.seen for group in step.groups]
        assert all(group % 3 == 0 for group in consumed) == dynamic
        assert (status["groups"]["DROPPED"].get("flat", 0) >= 2 * 12 * 8 - 2) == dynamic
        gaming = read_lines(tmp_path / "steps.jsonl")[-1]["gaming"]
        assert 0.4 < gaming["flat_groups"] < 0.9

    on_virtual_clock(work())


def test_a_policy_whose_groups_are_all_flat_ends_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flat_but(monkeypatch, 10**9)

    async def work() -> None:
        settings = config(rl={"validate_every": 1000, "dynamic_sampling": True})
        with pytest.raises(RuntimeError, match=r"the last 160 groups had one reward each.*switch dynamic sampling off"):
            await asyncio.wait_for(Simulation(tmp_path, settings).until(), 10_000.0)

    on_virtual_clock(work())


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_every_group_is_consumed_once_within_the_bound(tmp_path: Path, staleness: int) -> None:
    async def work() -> None:
        simulation = Simulation(tmp_path, config(max_staleness=staleness))
        status = await simulation.until()
        assert_whole(status, 12, 8)
        assert status["lengths"]["consumed"] == TOKENS
        consumed = [group for step in simulation.seen for group in step.groups]
        assert len(set(consumed)) == len(consumed) == 12 * 8
        assert all(step.version - step.oldest <= staleness for step in simulation.seen)
        assert staleness == 0 or any(step.version > step.oldest for step in simulation.seen)

    on_virtual_clock(work())


def test_each_group_is_recorded_with_the_seconds_from_its_lease_to_its_rows(tmp_path: Path) -> None:
    async def work() -> None:
        simulation = Simulation(tmp_path, config(), rollout_latency=Latency(2.5))
        await simulation.until()
        seconds = [second for record in read_lines(tmp_path / "steps.jsonl") for second in record["generation_seconds"]]
        assert set(seconds) == {2.5}
        assert 12 * 8 <= len(seconds) <= simulation.controller.ledger.admitted

    on_virtual_clock(work())


def test_simulated_time_repeats_exactly(tmp_path: Path) -> None:
    async def work(folder: Path) -> list[Consumed]:
        simulation = Simulation(folder, config(), seed=3)
        await simulation.until()
        return simulation.seen

    assert on_virtual_clock(work(tmp_path / "a")) == on_virtual_clock(work(tmp_path / "b"))


@pytest.mark.parametrize("seed", range(20))
def test_workers_that_die_at_random_lose_no_group(tmp_path: Path, seed: int) -> None:
    """Every three seconds or so one worker is killed, rollout or reward, whatever it does just then."""

    async def work() -> None:
        simulation = Simulation(tmp_path, config(steps=20), seed=seed, start=2.0)
        rng = np.random.default_rng(seed)

        async def kill() -> None:
            await simulation.controller.start()  # what cannot start at all is the user's to mend
            while True:
                await asyncio.sleep(float(rng.exponential(3.0)))
                if alive := sorted(simulation.placement.alive):
                    simulation.placement.crash(alive[int(rng.integers(len(alive)))])

        killing = asyncio.create_task(kill())
        status = await simulation.until()
        killing.cancel()
        assert_whole(status, 20, 8)
        assert len(status["deaths"]) >= 3
        assert status["groups"]["DROPPED"].get("poisoned", 0) == 0

    on_virtual_clock(work())


@pytest.mark.parametrize("staleness", [0, 1])
@pytest.mark.parametrize("block", range(10))
def test_a_run_killed_at_any_moment_and_resumed_loses_and_repeats_no_group(
    tmp_path: Path, block: int, staleness: int
) -> None:
    """Ten moments a block: 100 kills for each bound. What stands in the end is one unbroken history."""

    async def killed(folder: Path, moment: float) -> None:
        await Simulation(folder, config(max_staleness=staleness), seed=1).until(moment)

    async def resumed(folder: Path) -> None:
        simulation = Simulation(folder, config(max_staleness=staleness), seed=2)
        status = await simulation.until()
        assert_whole(status, 12, 8)
        assert [record["step"] for record in read_lines(folder / "steps.jsonl")] == list(range(12))
        assert all(step.version - step.oldest <= staleness for step in simulation.seen)
        consumed = [group for step in simulation.seen for group in step.groups]
        assert len(set(consumed)) == len(consumed)
        if staleness == 0:  # exact: each step consumes what it would have consumed without the kill
            assert all(sorted(step.groups) == list(range(8 * step.step, 8 * step.step + 8)) for step in simulation.seen)

    for moment in np.random.default_rng([block, staleness]).uniform(0.5, 28.0, 10):
        folder = tmp_path / f"{moment:.3f}"
        on_virtual_clock(killed(folder, float(moment)))
        first = checkpoints.newest(Run(folder).checkpoints)
        on_virtual_clock(resumed(folder))
        assert first is None or read_json(folder / "status.json")["attempt"] >= 1


def test_a_learner_that_returns_undoes_what_followed_its_checkpoint(tmp_path: Path) -> None:
    async def work() -> None:
        simulation = Simulation(tmp_path, config(steps=12))
        await simulation.controller.start()
        first = asyncio.create_task(
            learn(simulation.controller, Latency(1.0), simulation.rng, seen=simulation.seen.append)
        )
        while len(simulation.seen) < 8:
            await asyncio.sleep(0.1)
        first.cancel()
        again: list[Consumed] = []
        await learn(simulation.controller, Latency(1.0), simulation.rng, seen=again.append)
        await simulation.controller.stop()
        status = simulation.controller._status()
        assert_whole(status, 12, 8)
        assert status["attempt"] == 1
        assert again[0].step == 6
        assert [one["role"] for one in status["deaths"]] == ["learner"]

    on_virtual_clock(work())


def test_scaling_loses_no_group_and_changes_who_works(tmp_path: Path) -> None:
    async def work() -> None:
        simulation = Simulation(tmp_path, config(steps=40))
        controller = simulation.controller

        async def change() -> None:
            await asyncio.sleep(5.0)
            for rollouts, rewards in ((8, 1), (1, 3), (6, 2)):
                await controller.scale("rollout", rollouts)
                await controller.scale("reward", rewards)
                await asyncio.sleep(10.0)
                assert (len(controller.rollouts.alive), len(controller.rewards.alive)) == (rollouts, rewards)

        changing = asyncio.create_task(change())
        status = await simulation.until()
        await changing
        assert_whole(status, 40, 8)
        assert status["deaths"] == []
        assert status["groups"]["DROPPED"].keys() <= {"stale", "cancelled"}

    on_virtual_clock(work())


@pytest.mark.parametrize("moment", [0.0, 2.0])
def test_scaling_while_the_workers_start_changes_how_many_there_are(tmp_path: Path, moment: float) -> None:
    """Also before the start was asked for: those that it finds are not started again."""

    async def work() -> None:
        simulation = Simulation(tmp_path, config())
        controller = simulation.controller

        async def change() -> None:
            await asyncio.sleep(moment)
            await controller.scale("reward", 1)  # of 2 that start
            await controller.scale("rollout", 2)  # of 4
            await controller.scale("rollout", 3)

        changing = asyncio.create_task(change())
        await asyncio.sleep(0.01 if moment == 0.0 else 0.0)
        status = await simulation.until()
        await changing
        assert_whole(status, 12, 8)
        assert status["deaths"] == []
        assert (len(controller.rewards.describe()), len(controller.rollouts.describe())) == (1, 3)

    on_virtual_clock(work())


def test_a_starving_learner_gets_workers_and_a_slow_one_gives_them_back(tmp_path: Path) -> None:
    async def workers(folder: Path, learner: float) -> int:
        simulation = Simulation(
            folder,
            config(steps=80, rollout_workers={"min": 1, "max": 6}, engine={"max_num_seqs": 4}),
            rollout_latency=Latency(1.0),
        )
        await simulation.until(learner=learner)
        return simulation.controller.rollouts.wanted

    assert on_virtual_clock(workers(tmp_path / "fast", 0.5)) >= 4
    assert on_virtual_clock(workers(tmp_path / "slow", 40.0)) == 1


SLOW_REWARDS = {"groups_per_step": 64, "steps": 80, "max_staleness": 3, "engine": {"max_num_seqs": 64}}


def test_slow_rewards_get_more_reward_workers_until_the_learner_no_longer_starves(tmp_path: Path) -> None:
    """One scores 32 groups a second, the learner takes 64; the rollout workers could write 128."""

    async def work() -> None:
        simulation = Simulation(
            tmp_path,
            config(**SLOW_REWARDS, rollout_workers={"min": 8, "max": 12}, reward_workers={"min": 1, "max": 6}),
            rollout_latency=Latency(1.0),
            reward_latency=Latency(1.0),
        )
        most = {"rollout": 0, "reward": 0}

        async def watch() -> None:
            while True:
                for role in most:
                    most[role] = max(most[role], simulation.controller.staff.of(role).wanted)
                await asyncio.sleep(0.5)

        watching = asyncio.create_task(watch())
        status = await simulation.until()
        watching.cancel()
        assert_whole(status, 80, 64)
        assert 2 <= simulation.controller.rewards.wanted <= 4
        assert most["rollout"] == 8  # more of them would only have waited
        first, last = simulation.seen[2:10], simulation.seen[-20:]
        assert idle_share(first) > 0.4
        assert idle_share(last) < 0.2

    on_virtual_clock(work())


def test_both_roles_grow_when_both_are_too_few(tmp_path: Path) -> None:
    """Each writes or scores 32 groups a second at first: whichever limits grows, until the learner does."""

    async def work() -> None:
        simulation = Simulation(
            tmp_path,
            config(**SLOW_REWARDS, rollout_workers={"min": 2, "max": 12}, reward_workers={"min": 1, "max": 12}),
            rollout_latency=Latency(1.0),
            reward_latency=Latency(1.0),
        )
        assert_whole(await simulation.until(), 80, 64)
        assert 4 <= simulation.controller.rollouts.wanted <= 8
        assert 2 <= simulation.controller.rewards.wanted <= 4
        assert idle_share(simulation.seen[-20:]) < 0.2

    on_virtual_clock(work())


def idle_share(steps: list[Consumed]) -> float:
    waited = sum(step.waited for step in steps)
    return waited / (waited + sum(step.trained for step in steps))


def test_fast_rewards_give_reward_workers_back_and_a_fixed_number_stays(tmp_path: Path) -> None:
    async def workers(folder: Path, asked: Any) -> int:
        simulation = Simulation(folder, config(steps=80, reward_workers=asked), reward_latency=Latency(0.01))
        training = asyncio.create_task(simulation.until(learner=4.0))
        await asyncio.sleep(10.0)
        await simulation.controller.scale("reward", 3)
        assert_whole(await training, 80, 8)
        return simulation.controller.rewards.wanted

    assert on_virtual_clock(workers(tmp_path / "elastic", {"min": 1, "max": 4})) == 1
    assert on_virtual_clock(workers(tmp_path / "fixed", 2)) == 3  # what `rporec scale` said


def test_a_prompt_that_kills_engines_ends_the_run_with_its_reason(tmp_path: Path) -> None:
    async def work() -> None:
        simulation = Simulation(tmp_path, config())

        async def kill() -> None:
            while True:
                await asyncio.sleep(0.01)
                for worker in simulation.controller.rollouts.alive:
                    simulation.placement.crash(worker.name)

        await simulation.controller.start()
        killing = asyncio.create_task(kill())
        with pytest.raises(RuntimeError, match="rollout workers in a row died"):
            await learn(simulation.controller, Latency(1.0), simulation.rng, seen=simulation.seen.append)
        killing.cancel()
        assert simulation.controller.state == "FAILED"

    on_virtual_clock(work())


def test_a_late_validation_leaves_no_worker_behind(tmp_path: Path) -> None:
    """It puts an older version into a worker that has the newest: that one must come back, or nobody samples."""

    async def work() -> None:
        settings = config(steps=40, rollout_workers=1, reward_workers=1, rl={"validate_every": 2})
        simulation = Simulation(tmp_path, settings, rollout_latency=Latency(0.1), reward_latency=Latency(1.0))
        status = await asyncio.wait_for(simulation.until(learner=0.5), 10_000.0)
        assert_whole(status, 40, 8)
        validated = [record["version"] for record in read_lines(tmp_path / "validation.jsonl")]
        assert len(validated) > 5

    on_virtual_clock(work())


@pytest.mark.parametrize("staleness", [0, 1])
@pytest.mark.parametrize(
    ("role", "actor", "asked"),
    [("reward", SimulatedReward, "validate"), ("rollout", SimulatedRollout, "generate_many")],
)
def test_a_version_that_nobody_can_write_or_judge_is_left_with_a_notice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: str, actor: type, asked: str, staleness: int
) -> None:
    monkeypatch.setattr(actor, asked, lambda self, first, second: self.answer(1e9, dict))

    async def work() -> None:
        settings = config(max_staleness=staleness, engine={"max_num_seqs": 16, "timeout": 120.0})
        status = await asyncio.wait_for(Simulation(tmp_path, settings).until(), 10_000.0)
        assert_whole(status, 12, 8)
        assert read_lines(tmp_path / "validation.jsonl") == []
        said = [notice["message"].partition("; the last: ")[0] for notice in status["notices"]]
        assert said == [f"version 0.0 is not validated: 3 {role} workers were lost over it"]
        assert [death["role"] for death in status["deaths"]] == [role] * 3
        assert all(death["cause"].startswith("it hangs") for death in status["deaths"])

    on_virtual_clock(work())


def test_a_large_validation_may_take_longer_than_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = {"ndcg@10": 0.1, "hr@10": 0.2}
    monkeypatch.setattr(SimulatedReward, "validate", lambda self, samples, written: self.answer(700.0, lambda: result))
    monkeypatch.setattr(SimulatedRecipe, "validation", (np.arange(256), [], []))

    async def work() -> None:
        status = await asyncio.wait_for(Simulation(tmp_path, config(reward={"timeout": 120.0})).until(), 10_000.0)
        assert_whole(status, 12, 8)
        assert [record["version"] for record in read_lines(tmp_path / "validation.jsonl")] == [0]
        assert status["deaths"] == []

    on_virtual_clock(work())


def test_on_policy_groups_wait_for_the_validation_of_their_version(tmp_path: Path) -> None:
    """Else both share a batch, whose rounding then depends on the moment."""
    open_validations, started = [0], [0]

    class Watched(SimulatedRollout):
        def generate_many(self, prompts: Any, specs: Any) -> Any:
            open_validations[0] += 1
            writing = super().generate_many(prompts, specs)
            writing.add_done_callback(lambda _: open_validations.__setitem__(0, open_validations[0] - 1))
            return writing

        def generate_together(self, leases: Any, spec: Any) -> Any:
            assert open_validations[0] == 0
            started[0] += 1
            return super().generate_together(leases, spec)

    async def work() -> None:
        simulation = Simulation(tmp_path, config(max_staleness=0, rl={"validate_every": 1}))
        simulation.placement.rollout_kind = Watched
        assert_whole(await simulation.until(), 12, 8)

    on_virtual_clock(work())
    assert started[0] >= 12


def test_a_promotion_that_fails_is_told_and_ends_nothing(tmp_path: Path) -> None:
    """Simulated versions have no weights, so nothing is there to promote."""

    async def work() -> None:
        status = await Simulation(tmp_path, config(promotion={"automatic": True}, rl={"validate_every": 4})).until()
        assert_whole(status, 12, 8)
        assert any("was not promoted" in notice["message"] for notice in status["notices"])

    on_virtual_clock(work())
