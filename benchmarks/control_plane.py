"""The real controller and ledger with simulated workers: how much they can carry, and what they leave idle.

    rporec bench control-plane [--json]

`groups_per_second` is in real time, with engines that take none; `ray_groups_per_second` is the Ray path
apart, see `benchmarks.ray_path`. All else is in simulated time, where only the controller's decisions count: how
throughput grows with the workers, who waits, what a death costs. Generations take one second in the mean: each
(`constant`), log-normally (`long_tail`), or as those of a real run did (`recorded`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from actors.forecast import LONG_TAIL, Measured
from actors.simulated import Latency
from actors.simulated import on_virtual_clock as simulated
from benchmarks import ray_path
from benchmarks.result import result
from rporec.config import Config, parse_config
from rporec.files import read_json

SLOTS = 8  # groups that a simulated worker holds at once
RECORDED = Path(__file__).with_name("generation_seconds.json")
RAY_BATCH = 16  # groups of a call, against one


def settings(workers: int, groups: int, steps: int, **more: Any) -> Config:
    return parse_config(
        {
            "groups_per_step": groups,
            "steps": steps,
            "checkpoint_every": steps,
            "max_staleness": 1,
            "rollout_workers": workers,
            "engine": {"max_num_seqs": 4 * SLOTS},
            "rl": {"validate_every": 10_000},
            "promotion": {"automatic": False},  # there are no weights
            **more,
        }
    )


def scaling(workers: int, latency: Latency, steps: int = 12) -> Measured:
    """So many workers and a learner that needs next to no time: only rollouts limit the pace."""
    config = settings(workers, groups=2 * workers * SLOTS, steps=steps)
    return simulated(Measured(config, latency, Latency(1e-3)).run())


def balanced(latency: Latency) -> Measured:
    """Sixteen workers and a learner that takes as long for a step as they do for its groups."""
    config = settings(16, groups=4 * 16 * SLOTS, steps=30)
    return simulated(Measured(config, latency, Latency(4.0)).run())


def after_a_death(workers: int = 8) -> tuple[float, float]:
    """Groups per second before one worker is killed, and after, while no replacement is ready."""
    config = settings(workers, groups=2 * workers * SLOTS, steps=40)

    async def kill(measured: Measured) -> None:
        while len(measured.seen) < 20:
            await asyncio.sleep(0.1)
        measured.placement.start = 1e9
        measured.placement.crash("rollout-0")

    measured = simulated(Measured(config, Latency(1.0, 0.3), Latency(1e-3)).run(kill))
    groups, steps = config.groups_per_step, measured.seen
    before, after = (
        len(part) * groups / sum(one.waited + one.trained for one in part) for part in (steps[2:20], steps[22:])
    )
    return before, after


def null_engines(steps: int = 200, groups: int = 64) -> tuple[int, float, float]:
    """(groups, wall seconds, CPU seconds) with engines that answer at once, in real time."""
    measured = Measured(settings(8, groups, steps), Latency(), Latency())
    wall, cpu = time.perf_counter(), time.process_time()
    asyncio.run(measured.run())
    return steps * groups, time.perf_counter() - wall, time.process_time() - cpu


def memory_slope(steps: int) -> float:
    """KiB of resident memory that a simulated step adds, over the second half of many."""
    process, resident = psutil.Process(), []

    async def watch(measured: Measured) -> None:
        while True:
            resident.append((len(measured.seen), process.memory_info().rss / 1024))
            await asyncio.sleep(10.0)

    config = settings(8, 64, steps, checkpoint_every=10)  # which lets go of what was consumed
    simulated(Measured(config, Latency(1.0, 0.3), Latency(1.0)).run(watch))
    at, size = np.array([(step, kib) for step, kib in resident if step > steps / 2]).T
    return float(np.polyfit(at, size, 1)[0])


def recorded() -> Latency:
    """What generations of a real run took, as multiples of their mean."""
    seconds = np.array(read_json(RECORDED)["generation_seconds"])
    return Latency(recorded=tuple((seconds / seconds.mean()).tolist()))


QUICK = {"workers": (4, 64), "steps": 500}


def run(workers: Sequence[int] = (4, 16, 64, 512), steps: int = 2000) -> dict[str, Any]:
    """`workers`: how many to compare with one; `steps`: of the run whose memory is watched."""
    groups, wall, cpu = null_engines()
    one = scaling(1, Latency(1.0)).groups_per_second
    ratios: dict[str, Any] = {
        "groups_per_second": round(groups / wall),
        "groups_per_cpu_second": round(groups / cpu),
    }
    for count in workers:
        many = scaling(count, Latency(1.0), steps=12 if count < 512 else 6)
        ratios[f"scaling_1_to_{count}"] = round(many.groups_per_second / (count * one), 4)
        ratios[f"queued_groups_at_{count}"] = many.queued
    latencies = {"constant": Latency(1.0), "long_tail": Latency(1.0, LONG_TAIL), "recorded": recorded()}
    for name, latency in latencies.items():
        measured = balanced(latency)
        ratios[f"learner_idle_{name}"] = round(measured.learner_idle, 4)
        ratios[f"rollout_idle_{name}"] = round(measured.rollout_idle(SLOTS), 4)
        ratios[f"staleness_mean_{name}"] = round(measured.staleness, 3)
    before, after = after_a_death()
    ratios["after_killing_1_of_8"] = round(after / before, 4)
    ratios["memory_kib_per_step"] = round(memory_slope(steps), 3)
    walls = {"null_engines": wall}
    for by, (many, seconds) in ray_path.measure((1, RAY_BATCH), steps=100).items():
        name = "ray_groups_per_second" + (f"_by_{by}" if by > 1 else "")
        ratios[name] = round(many / seconds)
        walls[name.replace("groups_per_second", "path")] = seconds
    return result("control-plane", ratios, walls, {"null_engines": cpu})
