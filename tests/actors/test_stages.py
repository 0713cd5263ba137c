"""What the launcher says of a run before it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from actors import stages
from actors.cluster import Cluster
from actors.job import Job
from actors.stages import _left_out
from actors.teaching import teach
from rporec.config import SyntheticConfig, parse_config
from rporec.data import build
from rporec.data.synthetic import write_synthetic
from rporec.files import write_json
from rporec.recipes import StagedRecipe, load_recipe
from rporec.recipes.rporec import RPORec
from rporec.run import Run
from rporec.text.rationales import Rationale, write_shard


def recipe(folder: Path, context: int, **changes: Any) -> StagedRecipe:
    tiny = {"hidden": 64, "heads": 2, "kv_heads": 1, "layers": 1, "intermediate": 32, "context": context}
    config = parse_config({"tiny": tiny, "sampling": {"max_tokens": 40}, **changes})
    run = Run.create(folder / "run", config, resume=False)
    write_synthetic(folder / "raw", SyntheticConfig(users=60, series=12, volumes=3, genres=4, studios=4, length=7), 0)
    build(folder / "raw/interactions.parquet", folder / "raw/items.parquet", run.data, split="time", window=6)
    found = load_recipe(run, config)
    found.make_backbone()
    return load_recipe(run, config)


def test_nothing_is_said_where_every_history_fits(tmp_path: Path) -> None:
    assert _left_out(recipe(tmp_path, 256)) is None


def test_the_share_of_items_that_prompts_leave_out_is_said_with_the_knob(tmp_path: Path) -> None:
    short = recipe(tmp_path, 72)
    said = _left_out(short)
    writer, marker = short.writer, len(short.writer.prompt_ids([]))
    cut = total = 0
    for sample in short.evaluated("valid").tolist():
        items = writer.items.visible(short.dataset.history(sample))
        lengths = [len(writer.prompt_ids([item])) - marker for item in reversed(items)]
        cut += int((np.cumsum(lengths) > writer.budget - marker).sum())
        total += len(items)
    assert 0 < cut < total
    assert said is not None
    assert said.startswith(f"prompts: {cut / total:.0%} of the items of histories do not fit")
    assert "raise tiny.context (72 tokens, 40 of them for the completion)" in said


def test_a_teacher_with_nothing_left_to_write_starts_no_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taught = recipe(tmp_path, 256, teacher={"kind": "backbone"})
    assert isinstance(taught, RPORec)
    store = taught.run.folder / "rationales"
    write_shard(store, [Rationale(sample, "x", "backbone", "m", "") for sample in taught.slices.warmup.tolist()])
    monkeypatch.setattr("actors.teaching.RolloutPool", lambda *_: pytest.fail("engines were started"))
    job = Job(taught.run, taught.config, Cluster("", "", local=True, cuda=False), Console(quiet=True))
    teach(job, taught)
    assert len(list(store.iterdir())) == 1


def test_a_split_without_samples_has_nothing_to_leave_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = recipe(tmp_path, 72)
    monkeypatch.setattr(short, "evaluated", lambda split: short.dataset.split("valid")[:0])
    assert _left_out(short) is None


def test_the_control_warms_up_longer_by_what_stage_2_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In CPU seconds, at what a step of the first warm-up took."""
    long = recipe(tmp_path, 256)
    seconds = {"warmup": {"cpu_seconds": 100.0, "steps": 50}, "stage2": {"cpu_seconds": 31.0}}
    write_json(long.run.folder / "stages.json", seconds)
    asked: list[tuple] = []
    for name in ("_supervise", "_write_completions", "_train_heads"):
        monkeypatch.setattr(stages, name, lambda job, *given, name=name: asked.append((name, *given)))
    stages._more_warmup(Job(long.run, long.config, Cluster("", "", True, False), Console()), long)
    assert asked[0] == ("_supervise", "more_warmup", 50 + 16)
    assert asked[1][:3] == ("_write_completions", long, long.run.folder / "more_warmup/model")
    assert asked[2][2:] == ("more_warmup", {"more_warmup/head": "text"})
