"""What is compared with TRL is the same work, and what times it counts whole steps of one side at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from benchmarks import gpu_smoke, rollout
from benchmarks.peer_trl import WORKLOADS, compare
from benchmarks.turns import Side, Turn, in_turns
from benchmarks.workload import Dealt, Workload, prepare
from rporec.config import TinyConfig
from rporec.run import RunError

TINY = TinyConfig(hidden=64, heads=2, kv_heads=1, layers=1, intermediate=128, vocabulary=600)
SHORT = Workload(name="short", shape=TINY, prompt=24, lengths=(4, 12), groups=2, size=4, kl=0.05, context=64)
# A trainer: a child that computes, and a line for every step.
TRAINER = """
import json, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
for step in range(10_000):
    time.sleep(0.05)
    with open(sys.argv[1], "a") as file:
        print(json.dumps({"step": step}), file=file, flush=True)
"""


def trainer(name: str, folder: Path, script: str = TRAINER) -> Side:
    steps = folder / f"{name}.jsonl"
    command = [sys.executable, "-c", script, str(steps)]
    return Side(name, command, {}, steps, folder / f"{name}.log", os.sched_getaffinity(0))


def test_sides_take_turns_and_stand_still_between(tmp_path: Path) -> None:
    sides = [trainer(name, tmp_path) for name in ("a", "b")]
    try:
        for side in sides:
            side.warm_up(1, timeout=60)
        turns = in_turns(sides, rounds=2, seconds=0.1, timeout=60)
        lines = {side.name: side.steps.read_text() for side in sides}
        time.sleep(0.3)
        assert lines == {side.name: side.steps.read_text() for side in sides}
    finally:
        trees = [psutil.Process(side.pid).children(recursive=True) for side in sides]
        for side in sides:
            side.end()
    assert all(not process.is_running() for tree in trees for process in tree)
    for taken in turns.values():
        assert len(taken) == 2
        assert all(turn.steps >= 1 and turn.wall >= 0.1 for turn in taken)
        assert sum(turn.cpu for turn in taken) > 0  # the child's: the trainer itself sleeps


def test_a_side_that_ends_is_told_with_its_last_words(tmp_path: Path) -> None:
    side = trainer("c", tmp_path, "raise SystemExit('no such model')")
    with pytest.raises(RunError, match="c: it ended: no such model"):
        side.warm_up(1, timeout=60)
    side.end()


def test_ratios_are_of_the_better_thread_setting_by_each_clock() -> None:
    workload = SHORT  # 8 completions a step
    turns = {
        "ours": [Turn(4, 2.0, 4.0), Turn(8, 2.0, 4.0), Turn(6, 2.0, 4.0)],  # 16, 32, 24 a second
        "trl_1": [Turn(1, 1.0, 1.0)] * 3,  # 8 a second of either clock
        "trl_2": [Turn(1, 0.5, 2.0)] * 3,  # 16 and 4
    }
    found = compare(turns, workload)
    assert found["wall_pairs"] == [1.0, 2.0, 1.5]
    assert found["wall_over_trl"] == 1.5
    assert found["cpu_pairs"] == [1.0, 2.0, 1.5]
    assert found["cpu_rates"] == {"ours": 12.0, "trl_1": 8.0}


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda one: one.name)
def test_lengths_are_long_tailed_within_their_bounds(workload: Workload) -> None:
    low, high = workload.lengths
    lengths = [workload.length(number) for number in range(2000)]
    assert min(lengths) >= low
    assert max(lengths) == high
    assert lengths == [workload.length(number) for number in range(2000)]
    if low < high:
        assert np.median(lengths) < np.mean(lengths)


def test_a_prompt_is_the_same_as_text_and_as_tokens(tmp_path: Path) -> None:
    run = prepare(tmp_path / "run", SHORT)
    recipe = Dealt(run, run.config(), SHORT)
    tokenizer = recipe.writer.tokenizer
    for prompt in recipe.prompts([recipe.draw(number)[0] for number in range(20)]):
        assert len(prompt) == SHORT.prompt
        assert tokenizer.encode(tokenizer.decode(prompt)) == prompt.tolist()
    assert recipe.draw(recipe.passes)[0] == recipe.draw(0)[0]
    assert recipe.length(recipe.passes) == recipe.length(0) == recipe.rollout_spec(0).min_tokens


def test_the_rate_is_that_of_the_middle() -> None:
    """Nothing is written for a while, then 100 tokens a second, and the last ones slowly."""
    written = rollout.Written([0.0, 5.0, 6.0, 14.0, 20.0], [0, 0, 100, 900, 1000], [0.0, 1.0, 2.0, 10.0, 11.0])
    middle = written.rate("wall")
    assert middle == pytest.approx(100.0)


# In a process of its own: the engines' environment must stand before torch is imported.
SMOKE = """
import json
from benchmarks import gpu_smoke
from rporec.config import TinyConfig
from benchmarks.workload import Workload
shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2,
         "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 700}
workload = Workload.model_validate_json(%r)
print(json.dumps(gpu_smoke.run(6, workload=workload, shape=shape, settings=%r, kinds=["async"])))
"""


def smoke(settings: list[str]) -> dict[str, Any]:
    script = SMOKE % (SHORT.model_dump_json(), settings)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])["ratios"]


@pytest.mark.engine
@pytest.mark.cluster
def test_a_workload_trains_through_the_real_loop() -> None:
    found = smoke(["device=cpu", "engine.max_num_seqs=8", "engine.kv_cache_mb=64"])
    assert found["learner_tokens_per_second_async"] > 0
    assert found["weights_seconds_async"] > 0


@pytest.mark.engine
@pytest.mark.cluster
def test_one_gpu_holds_rollouts_and_learner() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA, and this machine has none")
    cache = "engine.args={kv_cache_memory_bytes: 1073741824}"
    shared = [setting for setting in gpu_smoke.SHARED if not setting.startswith("engine.args")]
    found = smoke([*shared, cache])
    assert found["weights_seconds_async"] > 0
