"""Stage 1 gives heads the samples and experts that they may know: never the RL slice to the networks of one that rewards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rporec.config import SyntheticConfig, override, parse_config
from rporec.data import build
from rporec.data.slices import rows_of, tuning_samples
from rporec.data.synthetic import write_synthetic
from rporec.engine.types import SamplingSpec
from rporec.models.experts import Experts
from rporec.models.head_inputs import HeadInputs
from rporec.models.head_training import fit_weights, train_head
from rporec.models.rechead import RecHead
from rporec.recipes import StagedRecipe, head_stage, load_recipe
from rporec.recipes.methods import _rewarding
from rporec.run import Run
from rporec.text.completion_store import Part

CONFIG = {
    "name": "heads",
    "backbone": "tiny",
    "head": {"dim": 16, "layers": 1, "heads": 2, "epochs": 1, "samples": "before_rl"},
    "max_head_samples": 60,
}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run.create(tmp_path / "run", parse_config(CONFIG), resume=False)
    world = SyntheticConfig(users=60, series=12, volumes=3, genres=4, studios=4, length=7)
    write_synthetic(tmp_path / "raw", world, 0)
    build(tmp_path / "raw/interactions.parquet", tmp_path / "raw/items.parquet", run.data, split="time", window=6)
    return run


def trained(run: Run, *changes: str, name: str = "head") -> StagedRecipe:
    recipe = load_recipe(run, override(run.config(), list(changes)))
    data = head_stage.history_data(recipe)
    head_stage.train_and_save_head(
        name, recipe, data, run, head_stage.CountedExperts(recipe), progress=lambda record: None
    )
    return recipe


def by_hand(recipe: StagedRecipe, samples: np.ndarray) -> RecHead:
    """One epoch on `samples`, in this order."""
    dataset = recipe.dataset
    head = RecHead(dataset.catalog, recipe.config.head, window=dataset.window, seed=recipe.config.seed)
    train_head(head, HeadInputs.of(dataset, samples), dataset.targets(samples), seed=recipe.config.seed)
    return head


@pytest.mark.parametrize("samples", ["slice", "before_rl"])
def test_a_head_that_rewards_learns_from_its_samples_and_one_for_test_from_validation_too(run, samples) -> None:
    recipe = trained(run, "head.refit=train+valid", f"head.samples={samples}")
    train, valid, slices = recipe.dataset.split("train"), recipe.dataset.split("valid"), recipe.slices
    assert len(slices.head) == 60 < len(slices.before_rl) == len(train) - len(slices.rl)
    wide = samples == "before_rl"
    others = np.setdiff1d(slices.before_rl, slices.head) if wide else train[:0]
    later = np.setdiff1d(train, slices.head) if wide else train[:0]
    expected = {
        "head": by_hand(recipe, np.concatenate([others, slices.head])),
        "head_refit": by_hand(recipe, np.concatenate([later, slices.head, valid])),
    }
    for name, head in expected.items():
        saved = RecHead.load(run.head(name), recipe.dataset.catalog).state_dict()
        assert all(torch.equal(value, saved[key]) for key, value in head.state_dict().items()), name


@pytest.mark.parametrize("samples", ["slice", "before_rl"])
def test_of_a_head_for_evaluation_alone_there_is_but_the_refitted_one(run, samples) -> None:
    changes = ["head.refit=train+valid", f"head.samples={samples}"]
    trained(run, *changes)
    recipe = trained(run, *changes, name="head_history")
    assert not run.head("head_history_refit").exists()
    rewarding, alone = (head_stage.final_head(run, recipe, name) for name in ("head", "head_history"))
    assert rewarding.weights == alone.weights
    assert all(torch.equal(value, alone.state_dict()[key]) for key, value in rewarding.state_dict().items())


def test_a_recommender_that_rewards_and_ranks_nothing_is_not_refitted(run) -> None:
    recipe = trained(run, "head.refit=train+valid", name="recommender")
    assert not run.head("recommender_refit").exists()
    expected = by_hand(
        recipe, np.concatenate([np.setdiff1d(recipe.slices.before_rl, recipe.slices.head), recipe.slices.head])
    )
    saved = RecHead.load(run.head("recommender"), recipe.dataset.catalog).state_dict()
    assert all(torch.equal(value, saved[key]) for key, value in expected.state_dict().items())


def test_what_a_recommender_says_of_beams_is_its_network_alone_and_unscaled(run) -> None:
    changes = ["recipe=rere", "max_staleness=0", "rere.collaborative=1", "head.fusion=residual"]
    recipe = trained(run, *changes, name="recommender")
    head, samples = RecHead.load(run.head("recommender"), recipe.dataset.catalog), recipe.slices.rl[:5]
    inputs = HeadInputs.of(recipe.dataset, samples)
    head.weights["history"] = 0.0  # as a search beside experts may end
    head.save(run.head("recommender"))
    network = head.network_components(head.encode(inputs))["history"]
    assert network.std() > 0
    assert not np.allclose(head.scores(inputs).numpy(), network)
    np.testing.assert_allclose(recipe.judge().scores(samples), network, atol=1e-6)


def test_test_is_ranked_by_the_head_that_rewarded_too_where_another_was_refitted(run) -> None:
    recipe = trained(run, "head.refit=train+valid", "head.fusion=residual")
    test = recipe.evaluated("test")
    titles = [recipe.dataset.catalog.title(item) for item in range(2)]
    texts = {
        stage: f"<think>{title}</think><answer>{title}</answer>"
        for stage, title in zip(("stage1", "stage2"), titles, strict=True)
    }
    for stage, text in texts.items():
        written = {"text": text, "item": None, "token_ids": [], "finish_reason": "stop"}
        part = Part(run.completions(stage, "test"), test, SamplingSpec())
        for shard in range(part.shards):
            part.write(shard, [[written]] * len(part.shard(shard)))
    catalog = recipe.dataset.catalog
    head, refitted = (RecHead.load(run.head(name), catalog) for name in ("head", "head_refit"))
    head.weights["text"] = 1.0
    head.text_scale.data.fill_(1.0)
    head.save(run.head("head"))
    rows = np.arange(len(test))
    expected = {
        f"rporec_{stage}_rewarding": head.scores(HeadInputs.of(recipe.dataset, test, [text] * len(test)))
        for stage, text in texts.items()
    }
    expected["rporec_stage2_rewarding_blank"] = head.scores(HeadInputs.of(recipe.dataset, test))
    found = {method.name: method.scores(rows) for method in _rewarding(recipe, run, True, test)}
    assert found.keys() == expected.keys()
    assert not np.allclose(found["rporec_stage2_rewarding_blank"], refitted.scores(HeadInputs.of(recipe.dataset, test)))
    for name, scores in expected.items():
        np.testing.assert_array_equal(found[name], scores.numpy())
    assert not np.allclose(found["rporec_stage1_rewarding"], found["rporec_stage2_rewarding"])


@pytest.mark.parametrize("refit", ["none", "train+valid"])
def test_scalars_are_searched_as_far_from_validation_as_test_will_be(run, refit, monkeypatch) -> None:
    searched: list[Experts] = []

    def search(head, *given, **more):
        searched.append(head.experts)
        return fit_weights(head, *given, **more)

    monkeypatch.setattr(head_stage, "fit_weights", search)
    recipe = trained(run, f"head.refit={refit}")
    dataset, final = recipe.dataset, head_stage.final_head(run, recipe, "head")
    train, valid = dataset.split("train"), dataset.split("valid")
    tuned = tuning_samples(dataset, refit=refit != "none")
    known = np.concatenate([train, valid]) if refit != "none" else train
    stored = RecHead.load(run.head("head"), dataset.catalog)
    assert len(searched) == (2 if refit != "none" else 1)
    for experts, samples in (*((one, tuned) for one in searched), (stored.experts, train), (final.experts, known)):
        expected = Experts.fit(dataset, rows_of(dataset, samples)).arrays()
        assert all(np.array_equal(value, experts.arrays()[name]) for name, value in expected.items())


def test_experts_are_counted_once_for_each_set_of_samples_and_as_if_for_it_alone(run) -> None:
    recipe = load_recipe(run, override(run.config(), ["head.reranker=true"]))
    train, valid = (recipe.dataset.split(split) for split in ("train", "valid"))
    both, experts = np.concatenate([train, valid]), head_stage.CountedExperts(recipe)
    assert experts.on(train) is experts.on(train.copy())
    alone = head_stage.CountedExperts(recipe).on(both)
    for name, value in experts.on(both).arrays().items():
        np.testing.assert_array_equal(value, alone.arrays()[name])


def test_heads_without_experts_count_none(run) -> None:
    recipe = load_recipe(run, override(run.config(), ["head.experts=false"]))
    assert head_stage.CountedExperts(recipe).on(recipe.dataset.split("train")) is None
