"""One small training on offline preferences through the command line, negatives from real beams.

Its learner is killed in the warm-up, all of it in the preference stage: what is looked at here was resumed twice.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from trained_run import Killed, killed, rporec

from rporec.files import read_json, read_lines, write_json
from rporec.recipes.preference import Preference
from rporec.run import Run
from rporec.text.completion_store import read_items

pytestmark = [pytest.mark.engine, pytest.mark.cluster]

CONFIG = """
name: small-preference
recipe: preference
data: {window: 6, synthetic: {users: 160, series: 20, volumes: 4, genres: 4, studios: 6, length: 8}}
tiny: {hidden: 64, heads: 2, kv_heads: 1, layers: 1, intermediate: 128, vocabulary: 420, context: 96}
warmup: {steps: 180, batch_size: 16, lr: 6e-3, checkpoint_every: 25}
rere: {eval_beams: 12}
preference: {loss: napo, negatives: beams, beta: 0.5, similarity: 0.3}
head: {epochs: 2, dim: 32}
groups_per_step: 6
group_size: 5
steps: 60
checkpoint_every: 6
max_eval_samples: 40
evaluate: {baselines: [popularity], conventions: headline}
rl: {lr: 1e-3, schedule: cosine, grad_clip: 0.3}
"""


@dataclass(frozen=True)
class Broken:
    """A finished run, and what its logs held when it was killed."""

    run: Run
    warmup: Killed
    steps: Killed


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Broken:
    work = tmp_path_factory.mktemp("preference")
    (work / "config.yaml").write_text(CONFIG)
    folder = work / "run"
    command = "train", str(work / "config.yaml"), "--run", str(folder)
    warmup = killed(folder / "warmup.jsonl", 40, *command, learner=True)
    steps = killed(folder / "steps.jsonl", 10, *command, "--resume")
    result = rporec(*command, "--resume")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return Broken(Run.open(folder), warmup, steps)


@pytest.fixture
def run(broken: Broken) -> Run:
    return broken.run


@pytest.mark.parametrize(("log", "every"), [("warmup", 25), ("steps", 6)])
def test_a_killed_training_goes_on_from_its_newest_checkpoint_bit_for_bit(broken: Broken, log: str, every: int) -> None:
    killed_at: list[dict[str, Any]] = getattr(broken, log).records
    finished = read_lines(broken.run.folder / f"{log}.jsonl")
    assert [record["step"] for record in finished] == list(range(finished[-1]["step"] + 1)), "each step stands once"
    assert len(killed_at) < len(finished), "it was killed before its end"
    assert [record["loss"] for record in finished[: len(killed_at)]] == [record["loss"] for record in killed_at]
    assert finished[:every] == killed_at[:every], (
        "what is behind a checkpoint was not done again: not even its times differ"
    )


def test_a_learner_that_dies_ends_the_command_with_one_line_that_says_how_to_go_on(broken: Broken) -> None:
    line = broken.warmup.output.strip().splitlines()[-1]
    assert broken.warmup.status == 2
    assert line.startswith("rporec: warmup: learner rank 0 died: ")
    assert "killed from outside" in line
    assert line.endswith("what is finished is kept, --resume goes on from there")


def test_what_is_finished_leaves_no_checkpoint(run: Run) -> None:
    assert not (run.folder / "warmup" / "checkpoints").exists()
    assert not run.checkpoints.exists()


def test_fewer_steps_than_are_done_are_refused(run: Run, tmp_path: Path) -> None:
    """Cut off after its end, that is: with a checkpoint, and without a stage that counts as finished."""
    copy = tmp_path / "run"
    shutil.copytree(run.folder, copy, ignore=shutil.ignore_patterns("ray", "best"))
    stages = read_json(copy / "stages.json")
    write_json(copy / "stages.json", {name: stages[name] for name in ("data", "warmup", "stage1")})
    (copy / "checkpoints" / "step_12").mkdir(parents=True)
    result = rporec("train", str(copy / "config.json"), "--run", str(copy), "--resume", "steps=6")
    assert result.returncode == 2
    assert "steps: 6, but" in result.stderr
    assert "has done 12 already; ask for as many or more" in result.stderr


def test_it_stands_in_the_table_beside_the_warm_up_that_it_began_with(run: Run) -> None:
    conventions = read_json(run.folder / "metrics.json")["conventions"]
    assert conventions.keys() == {"exclude_history"}, "no other was asked for"
    assert not run.completions("stage2", "test_all").exists()
    summary = conventions["exclude_history"]
    assert set(summary["methods"]) == {"popularity", "rere_sft", "napo", "oracle"}
    assert "napo-rere_sft" in summary["paired"]
    assert (run.folder / "report.html").stat().st_size > 0


def test_negatives_are_what_the_llm_would_write_and_nothing_that_the_user_had(run: Run) -> None:
    recipe = Preference(run, run.config())
    written = dict(zip(*read_items(run.completions("stage1", "negatives")), strict=True))
    for group in recipe.groups(range(24)):
        [target] = recipe.dataset.targets([group.sample]).tolist()
        assert group.items[0] == target
        had = {*recipe.dataset.seen(group.sample).tolist(), target}
        expected = [item for item in written[group.sample].tolist() if item not in had][:4]
        assert group.items[1:].tolist() == expected
        assert [row.tolist() for row in group.tokens.completions] == [recipe.tokens[item] for item in group.items]


def test_the_policy_moves_from_its_reference_step_by_step(run: Run) -> None:
    records = read_lines(run.steps)
    assert [record["step"] for record in records] == list(range(60))
    assert records[0]["margin"] == pytest.approx(0, abs=1e-4)
    assert records[-1]["margin"] > 0.01
    assert all(record["negatives"] >= 4 for record in records)
