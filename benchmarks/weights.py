"""What it costs to bring new weights to engines, against the learner step that makes them.

    rporec bench weights [--json]

A 10 M-parameter Qwen3 made on the spot, the learner's own step on made-up groups, the real store and two real
engines as Ray actors, all on one machine: medians of several rounds. `flatten` and `hand_over` are on the learner's
path; `put` ends when the store has the version, `bring_1` and `bring_2` when one engine, or both at once, have it.
`sync_share_of_step` takes all of them one after the other, as if nothing overlapped.
"""

from __future__ import annotations

import logging
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.result import result
from rporec.config import Config, TinyConfig, parse_config
from rporec.engine.types import Generated, Version
from rporec.rl.rewards import Scored
from rporec.rl.rollout_schema import Lease, rollout_batch, with_rewards

TEN_MILLION = TinyConfig(hidden=384, heads=6, kv_heads=3, intermediate=1152, layers=6, context=256)
GROUPS, GROUP_SIZE = 32, 4  # of a learner step; half of the config's default, so the share is the greater
STEPS = 3  # a step takes as long as all else together
PROMPT, COMPLETION = 40, 30  # tokens, as on the embedded data


class Timings:
    """Wall and CPU seconds by part, of one round after the other."""

    def __init__(self) -> None:
        self.wall: dict[str, list[float]] = defaultdict(list)
        self.cpu: dict[str, list[float]] = defaultdict(list)

    def measure(self, part: str, work: Callable[[], Any], cpu: Callable[[], float] = time.process_time) -> Any:
        """`cpu`: seconds so far of the processes that do the work."""
        before, began = cpu(), time.perf_counter()
        done = work()
        self.wall[part].append(time.perf_counter() - began)
        self.cpu[part].append(cpu() - before)
        return done

    @staticmethod
    def medians(rounds: dict[str, list[float]]) -> dict[str, float]:
        return {part: statistics.median(seconds) for part, seconds in rounds.items()}


def groups(
    count: int, size: int, vocabulary: int, seed: int = 0, *, prompt: int = PROMPT, completion: int = COMPLETION
) -> list[pa.RecordBatch]:
    """Scored groups of random tokens and rewards."""
    rng = np.random.default_rng(seed)

    def one(number: int) -> pa.RecordBatch:
        spans = ((Version(0, 0), 0, completion),)
        written = [
            Generated(
                rng.integers(5, vocabulary, completion).astype(np.int32),
                np.full(completion, -np.log(vocabulary), np.float32),
                spans,
                "stop",
                "x" * completion,
            )
            for _ in range(size)
        ]
        lease = Lease(number, number, rng.integers(5, vocabulary, prompt).astype(np.int32), number)
        reward = rng.random(size).astype(np.float32)
        scored = Scored(np.ones(size), {"ndcg": reward}, reward, np.zeros(size, bool))
        return with_rewards(rollout_batch(lease, written, [["x"] * completion] * size), scored)

    return [one(number) for number in range(count)]


def measure(folder: Path, tiny: TinyConfig, config: Config, rounds: int) -> tuple[Timings, dict[str, Any]]:
    """One round that is not counted, then `rounds`; and what was sent."""
    from actors.cluster import cores
    from rporec.models.trainable import learner_environment

    os.environ.update(learner_environment(False, threads=cores()))  # before DeepSpeed and torch are imported
    from rporec.models.backbone import make_tiny

    logging.getLogger("rporec.models.backbone").setLevel(logging.ERROR)  # that 10 M are many for tiny
    model = make_tiny(["alpha beta gamma delta 1 2 3"] * 4, tiny, config.seed, folder / "model")
    from rporec.engine.weights import checksum, flatten
    from rporec.rl.learner import Clock, Learner

    learner, timings = Learner(model, config), Timings()
    batch = groups(config.groups_per_step, config.group_size, learner.policy.engine.module.config.vocab_size)
    for _ in range(min(rounds, STEPS) + 1):
        timings.measure("step", lambda: learner.step(batch, Version(0, 0), Clock()))
    for _ in range(rounds + 1):
        flat = timings.measure("flatten", lambda: flatten(learner.policy.named_weights()))
        timings.measure("checksum", lambda buffer=flat.buffer: checksum(buffer))
    _publish(model, config, flat, timings, rounds)
    for part in (timings.wall, timings.cpu):
        for seconds in part.values():
            del seconds[0]  # first times: allocations, imports
    parameters = sum(parameter.numel() for parameter in learner.policy.engine.module.parameters())
    return timings, {"parameters": parameters, "mebibytes": round(flat.nbytes / 2**20, 1)}


def _publish(model: Path, config: Config, flat: Any, timings: Timings, rounds: int) -> None:
    import ray

    from actors.cluster import connected, core
    from actors.rollout import RolloutWorker, rollout_options
    from actors.weight_store import WeightStore

    with connected(config, None, "bench"):
        store: Any = WeightStore.remote()
        engines: list[Any] = [
            RolloutWorker.options(**rollout_options(config.engine)).remote(
                f"rollout-{place}", str(model), config.engine, TEN_MILLION.context, place, core(place)
            )
            for place in range(2)
        ]

        def cpu(*actors: Any) -> float:
            there = ray.get([actor.__ray_call__.remote(lambda _: time.process_time()) for actor in actors])
            return time.process_time() + sum(there)

        def bring(version: Version, some: list[Any]) -> None:
            stored = ray.get(store.get.remote(version))
            ray.get([engine.update_weights.remote(version, stored) for engine in some])

        ray.get([engine.status.remote() for engine in engines])
        for number in range(rounds + 1):
            one, two = Version(0, 2 * number + 1), Version(0, 2 * number + 2)
            answer = timings.measure("hand_over", lambda version=one: store.put.remote(version, flat))
            ray.get(answer)
            timings.measure("put", lambda version=two: ray.get(store.put.remote(version, flat)), lambda: cpu(store))
            timings.measure("bring_1", lambda version=one: bring(version, engines[:1]), lambda: cpu(engines[0]))
            timings.measure("bring_2", lambda version=two: bring(version, engines), lambda: cpu(*engines))


QUICK = {"rounds": 3}


def run(tiny: TinyConfig = TEN_MILLION, rounds: int = 5, group_count: int = GROUPS) -> dict[str, Any]:
    config = parse_config(
        {
            "groups_per_step": group_count,
            "group_size": GROUP_SIZE,
            "rollout_workers": 2,
            "engine": {"kv_cache_mb": 64, "max_num_seqs": 32},
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        timings, sent = measure(Path(folder), tiny, config, rounds)
    wall, cpu = timings.medians(timings.wall), timings.medians(timings.cpu)
    learner_path = wall["flatten"] + wall["hand_over"]
    ratios = {
        "sync_share_of_step": round((wall["flatten"] + wall["put"] + wall["bring_2"]) / wall["step"], 4),
        "learner_share_of_step": round(learner_path / wall["step"], 4),
        "bring_2_to_1": round(wall["bring_2"] / wall["bring_1"], 2),
        "publish_to_2_cpu_seconds": round(cpu["flatten"] + cpu["put"] + cpu["bring_2"], 3),
        **sent,
    }
    return result("weights", ratios, wall, cpu, rounds=rounds)
