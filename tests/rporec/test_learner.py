"""A step is the same however its groups are cut into micro-batches: by the real learner, under DeepSpeed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

# In a process of its own: the learner's environment must stand before DeepSpeed is imported.
STEP = """
import json, os, sys
from pathlib import Path
from rporec.models.trainable import learner_environment
os.environ.update(learner_environment(False, threads=1))
from benchmarks.weights import groups
from rporec.config import TinyConfig, parse_config
from rporec.engine.types import Version
from rporec.models.backbone import make_tiny
from rporec.rl.learner import Clock, Learner

tiny = TinyConfig(hidden=64, heads=2, kv_heads=1, layers=1, intermediate=128, vocabulary=300)
model = make_tiny(["alpha beta gamma"] * 4, tiny, 0, Path(sys.argv[1]) / "model")
found = []
for size in (5, 2, 1):
    config = parse_config({"groups_per_step": 5, "group_size": 3, "rl": {"kl": 0.1, "micro_batch_groups": size}})
    learner = Learner(model, config)
    words = learner.policy.engine.module.config.vocab_size
    steps = [
        learner.step(groups(5, 3, words, seed, prompt=9, completion=6), Version(0, 0), Clock())
        for seed in range(2)
    ]
    found.append([{key: step[key] for key in ("loss", "kl", "entropy", "grad_norm", "tokens")} for step in steps])
print(json.dumps(found))
"""


def test_any_cut_into_micro_batches_takes_the_same_step(tmp_path) -> None:
    done = subprocess.run([sys.executable, "-c", STEP, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    whole, *cut = json.loads(done.stdout.splitlines()[-1])
    assert all(step["grad_norm"] > 0 for step in whole)
    for steps in cut:
        for one, other in zip(steps, whole, strict=True):
            assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
