"""Benchmarks run, at a size that says nothing about speed; no test asserts a time."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from actors.simulated import Latency
from benchmarks import async_training, baselines, control_plane, packing, ray_path, retrieval
from benchmarks.result import result
from benchmarks.rounds import in_turns
from rporec.arguments import BENCHMARKS
from rporec.config import SyntheticConfig, TinyConfig


@pytest.mark.parametrize("module", BENCHMARKS.values())
def test_each_name_has_a_benchmark(module: str) -> None:
    assert callable(importlib.import_module(f"benchmarks.{module}").run)


def test_a_result_is_json_with_its_machine() -> None:
    told = json.loads(json.dumps(result("x", {"a": 1.0}, {"b": 2.0}, {"b": 1.0})))
    assert set(told) == {"name", "machine", "ratios", "wall_seconds", "cpu_seconds"}
    assert told["machine"]["cores"] >= 1


def test_throughput_grows_with_simulated_workers() -> None:
    """In simulated time, so this holds on any machine: four workers write four times as much as one."""
    one, four = (control_plane.scaling(workers, Latency(1.0), steps=6).groups_per_second for workers in (1, 4))
    assert four / (4 * one) > 0.95


def test_a_death_costs_one_workers_share() -> None:
    before, after = control_plane.after_a_death(workers=4)
    assert 0.9 * 3 / 4 < after / before < 0.9


def test_null_engines_consume_every_group() -> None:
    groups, wall, cpu = control_plane.null_engines(steps=3, groups=8)
    assert groups == 24
    assert min(wall, cpu) > 0


def test_ways_take_turns_and_the_first_round_does_not_count() -> None:
    calls: list[tuple[str, int]] = []
    ways = {way: lambda number, way=way: calls.append((way, number)) for way in ("a", "b")}
    found = in_turns("test", ways, rounds=2)
    assert calls == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert found.wall["a"].shape == found.cpu["b"].shape == (2,)


def test_both_layouts_learn_from_the_same_log_probabilities() -> None:
    shape = TinyConfig(hidden=64, layers=2, heads=2, kv_heads=1, intermediate=64, vocabulary=300)
    found, difference = packing.measure("tiny", shape, prompt=16, completion=4, size=3, rounds=1)
    assert found.times("plain", "packed") > 0
    assert difference < 1e-4


def test_retrieval_counts_what_the_approximation_finds_of_the_exact_ten() -> None:
    found = retrieval.measure(20_000, queries=20, warm_up=0)
    assert set(found["cases"]) == {"all", "filtered", "excluded", "filtered_and_excluded"}
    for numbers in found["cases"].values():
        assert 0.9 < numbers["recall_at_10"] <= 1
        assert numbers["p99_ms"] >= numbers["p50_ms"] > 0
    assert 0 < found["memory"]["index_mib"] < found["memory"]["vectors_mib"]


SMALL = {
    "data": {"window": 6, "synthetic": {"users": 80, "series": 8, "volumes": 3, "genres": 4, "studios": 4}},
    "tiny": {"hidden": 64, "heads": 2, "kv_heads": 1, "layers": 1, "intermediate": 128, "context": 256},
    "head": {"dim": 16, "layers": 1},
    "engine": {"kv_cache_mb": 64, "max_num_seqs": 8},
}
IN_ITS_OWN_PROCESS = """
import json, sys
from benchmarks import reward
from rporec.config import parse_config

found, difference = reward.measure(parse_config(json.loads(sys.argv[1])), sizes=(3, 1), groups=3, rounds=1)
print(json.dumps([found.median("cpu"), difference]))
"""


@pytest.mark.engine
def test_batches_give_the_rewards_of_one_completion_at_a_time() -> None:
    command = [sys.executable, "-c", IN_ITS_OWN_PROCESS, json.dumps(SMALL)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    seconds, difference = json.loads(done.stdout.splitlines()[-1])
    assert set(seconds) == {"batches_3", "batches_1", "one_by_one", "generation"}
    assert min(seconds.values()) > 0
    assert difference < 1e-6


TRIE_IN_ITS_OWN_PROCESS = """
import json
from benchmarks import trie
from rporec.config import TinyConfig

shape = TinyConfig(hidden=64, layers=1, heads=2, kv_heads=1, intermediate=64, vocabulary=300, context=128)
found, same = trie.measure(shape, items=50, prompts=3, beams=4, lengths=(20, 60, 40), rounds=1)
print(json.dumps([found.median("cpu"), same]))
"""


@pytest.mark.engine
def test_beams_and_generate_find_the_same_items() -> None:
    done = subprocess.run([sys.executable, "-c", TRIE_IN_ITS_OWN_PROCESS], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    seconds, same = json.loads(done.stdout.splitlines()[-1])
    assert set(seconds) == {"trie", "generate", "trie_long", "generate_long", "trie_shared"}
    assert same == 1  # items of one length, so that neither ends one before the other


def test_recorded_latencies_are_multiples_of_their_mean_and_drive_the_controller() -> None:
    latency = control_plane.recorded()
    assert len(latency.recorded) >= 100
    assert np.mean(latency.recorded) == pytest.approx(1.0)
    measured = control_plane.balanced(latency)
    assert 0 < measured.learner_idle < 1
    assert len(measured.seen) == measured.config.steps


@pytest.mark.cluster
def test_every_group_takes_the_ray_path() -> None:
    for groups, seconds in ray_path.measure((1, 5), steps=3).values():
        assert groups == 3 * ray_path.GROUPS
        assert seconds > 0


@pytest.mark.engine
@pytest.mark.cluster
def test_weights_reach_two_engines() -> None:
    """In a process of its own: the learner's environment must stand before torch is imported."""
    script = "import json; from benchmarks.weights import *; print(json.dumps(run(SMALL, rounds=1, group_count=4)))"
    small = repr(TinyConfig(hidden=64, heads=2, kv_heads=1, layers=1, intermediate=128))
    script = f"from rporec.config import SyntheticConfig, TinyConfig; SMALL = {small}; {script}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["ratios"]["parameters"] > 0
    parts = {"step", "flatten", "checksum", "hand_over", "put", "bring_1", "bring_2"}
    assert set(told["wall_seconds"]) == set(told["cpu_seconds"]) == parts
    assert {"sync_share_of_step", "learner_share_of_step"} <= set(told["ratios"])


def a_step(wait: float, total: float, reward: float, load: float | None = None) -> dict[str, Any]:
    return {
        "seconds": {"wait": wait, "total": total},
        "reward_mean": reward,
        "reward_worker_busy": 0.02,
        "loads": {} if load is None else {"rollout": load, "reward": 0.1},
        "dropped": {"stale": 4},
    }


def test_asynchrony_is_held_against_the_longer_of_both_times() -> None:
    """2 s of rollouts and 3 s of learner: 5 s in turn, 3 s at best, and here 3.2 s, of which 0.4 s waiting."""
    steps = range(12)
    first = [a_step(50.0, 90.0, 0.0)] * async_training.WARMING  # warming up counts for nothing
    last = [a_step(0.0, 70.0, 0.5)]  # nor the step that nothing overlaps
    in_turn = [*first, *(a_step(2.0, 5.0, 0.5) for _ in steps), *last]
    overlapped = [
        *first,
        *(a_step(0.4, 3.2, 0.52, 1.5) if step % 2 else a_step(0.4, 3.2, 0.48, 0.6) for step in steps),
        *last,
    ]
    told = async_training.compare([in_turn, in_turn], [overlapped, overlapped])
    assert told["async_over_sync"] == pytest.approx(5.0 / 3.2, abs=1e-3)
    assert told["possible"] == pytest.approx(5.0 / 3.0, abs=1e-3)
    assert told["share_of_possible"] == pytest.approx(3.0 / 3.2, abs=1e-3)
    assert told["rollout_over_learner"] == pytest.approx(2 / 3, abs=1e-3)
    assert told["learner_idle"] == pytest.approx(0.125)
    assert told["rollout_idle"] == pytest.approx(0.2), "what queues for a slot does not make others busier"
    assert told["reward_share"] == pytest.approx(0.1 / 1.9, abs=1e-4)
    assert told["dropped_stale"] == pytest.approx(4 / (4 + len(overlapped) * 48), abs=1e-4)
    assert told["reward_sync"] == 0.5
    low, high = told["reward_difference_ci"]
    assert low < told["reward_difference"] < high
    assert high - low == pytest.approx(2 * 2.776 * 0.02 / 5**0.5, abs=2e-4)  # 4 degrees of freedom


def test_a_lower_reward_shows_in_the_interval() -> None:
    sync = [a_step(1.0, 2.0, 0.5 + 0.01 * (step % 3)) for step in range(30)]
    worse = [a_step(1.0, 2.0, 0.4 + 0.01 * (step % 2)) for step in range(30)]
    low, high = async_training.reward_interval([sync], [worse])
    assert low < high < 0


def test_all_baselines_but_networks_are_timed_on_a_small_world() -> None:
    names = ("popularity", "itemknn", "text_rules")
    found = baselines.measure(SyntheticConfig(users=60, series=8, volumes=2, genres=4, studios=4, length=8), names)
    assert set(found["ndcg@10"]) == set(names)
    assert {"everything", "again", "tune_itemknn"} <= set(found["wall"])
