"""One small training on offline preferences through the command line, negatives from real beams."""

from __future__ import annotations

import pytest
from trained_run import rporec

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
warmup: {steps: 120, batch_size: 16, lr: 6e-3}
rere: {eval_beams: 12}
preference: {loss: napo, negatives: beams, beta: 0.5, similarity: 0.3}
head: {epochs: 2, dim: 32}
groups_per_step: 6
group_size: 5
steps: 4
max_eval_samples: 40
evaluate: {baselines: [popularity], conventions: headline}
rl: {lr: 1e-3, schedule: cosine, grad_clip: 0.3}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    work = tmp_path_factory.mktemp("preference")
    (work / "config.yaml").write_text(CONFIG)
    result = rporec("train", str(work / "config.yaml"), "--run", str(work / "run"))
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return Run.open(work / "run")


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
    assert [record["step"] for record in records] == list(range(4))
    assert records[0]["margin"] == pytest.approx(0, abs=1e-4)
    assert records[-1]["margin"] > 0.01
    assert all(record["negatives"] >= 4 for record in records)
