"""One small training on offline preferences through the command line, negatives from real beams.

It is killed in its warm-up and again in its preference stage, and resumed: what is looked at here has gone on twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from trained_run import killed, rporec

from rporec.files import read_json, read_lines
from rporec.recipes.preference import Preference
from rporec.run import Run
from rporec.text.completion_store import read_items

pytestmark = [pytest.mark.engine, pytest.mark.cluster]

CONFIG = """
name: small-preference
recipe: preference
data: {window: 6, synthetic: {users: 160, series: 20, volumes: 4, genres: 4, studios: 6, length: 8}}
tiny: {hidden: 64, heads: 2, kv_heads: 1, layers: 1, intermediate: 128, vocabulary: 420, context: 96}
warmup: {steps: 120, batch_size: 16, lr: 6e-3, checkpoint_every: 25}
rere: {eval_beams: 12}
preference: {loss: napo, negatives: beams, beta: 0.5, similarity: 0.3}
head: {epochs: 2, dim: 32}
groups_per_step: 6
group_size: 5
steps: 40
checkpoint_every: 6
max_eval_samples: 40
evaluate: {baselines: [popularity], conventions: headline}
rl: {lr: 1e-3, schedule: cosine, grad_clip: 0.3}
"""


@dataclass(frozen=True)
class Broken:
    """A finished run, and what its logs held when it was killed."""

    run: Run
    warmup: list[dict[str, Any]]
    steps: list[dict[str, Any]]


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Broken:
    work = tmp_path_factory.mktemp("preference")
    (work / "config.yaml").write_text(CONFIG)
    folder = work / "run"
    command = "train", str(work / "config.yaml"), "--run", str(folder)
    warmup = killed(folder / "warmup.jsonl", 40, *command)
    steps = killed(folder / "steps.jsonl", 10, *command, "--resume")
    result = rporec(*command, "--resume")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return Broken(Run.open(folder), warmup, steps)


@pytest.fixture
def run(broken: Broken) -> Run:
    return broken.run


@pytest.mark.parametrize(("log", "every"), [("warmup", 25), ("steps", 6)])
def test_a_killed_training_goes_on_from_its_newest_checkpoint_bit_for_bit(broken: Broken, log: str, every: int) -> None:
    killed_at: list[dict[str, Any]] = getattr(broken, log)
    finished = read_lines(broken.run.folder / f"{log}.jsonl")
    assert [record["step"] for record in finished] == list(range(finished[-1]["step"] + 1)), "each step stands once"
    assert len(killed_at) < len(finished), "it was killed before its end"
    assert [record["loss"] for record in finished[: len(killed_at)]] == [record["loss"] for record in killed_at]
    assert finished[:every] == killed_at[:every], (
        "what is behind a checkpoint was not done again: not even its times differ"
    )


def test_a_finished_warm_up_leaves_no_checkpoint(broken: Broken) -> None:
    assert not (broken.run.folder / "warmup" / "checkpoints").exists()


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
    assert [record["step"] for record in records] == list(range(40))
    assert records[0]["margin"] == pytest.approx(0, abs=1e-4)
    assert records[-1]["margin"] > 0.01
    assert all(record["negatives"] >= 4 for record in records)
