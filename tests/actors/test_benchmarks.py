"""Benchmarks run, at a size that says nothing about speed; no test asserts a time."""

from __future__ import annotations

import importlib
import json

import pytest

from actors.simulated import Latency
from benchmarks import control_plane
from benchmarks.result import result
from rporec.cli import BENCHMARKS


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
