"""Baselines say what their formulas say, are chosen on validation alone, and come back from disk as they were."""

from __future__ import annotations

import multiprocessing
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from rporec.baselines import family
from rporec.baselines.family import Validation, tune
from rporec.baselines.gru4rec import GRU4Rec
from rporec.baselines.item_to_item import EASE, EVERY, Rules, TextKNN
from rporec.baselines.popularity import Popularity, Recent
from rporec.baselines.processes import Work, fit, processes
from rporec.baselines.sasrec import SASRec
from rporec.baselines.store import BaselineStore, families
from rporec.baselines.text_rules import Blend, TextRules
from rporec.config import BASELINES, SyntheticConfig
from rporec.data import Dataset, build
from rporec.data.slices import held_rows, tuning_samples
from rporec.data.synthetic import write_synthetic
from rporec.models.experts import HAIR, Experts
from rporec.models.head_inputs import HeadInputs

DAY = 86_400
PARAMETERS = {
    "popularity": {},
    "recent_popularity": {"half_life": 0.1},
    "itemknn": {"shrinkage": 2.0, "neighbours": 7, "itself": False, "recent": EVERY},
    "ease": {"penalty": 30.0, "recent": 5},
    "rules": {"lags": 3, "shrinkage": 5.0, "recent": 3},
    "text_knn": {"itself": True, "recent": 2},
    "text_rules": {"weights": {"rules": 0.5, "rules_linear": 1.0, "text_newest": 0.2, "popularity": 0.1}},
    "text_rules_reranked": {"weights": {"rules": 0.5, "popularity": 0.1, "reranked": 1.0}},
    "gru4rec": {"dropout": 0.2, "lr": 3e-3, "epochs": 1},
    "sasrec": {"dropout": 0.2, "lr": 3e-3, "epochs": 1},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Dataset:
    folder = tmp_path_factory.mktemp("world")
    write_synthetic(folder, SyntheticConfig(users=150, series=16, volumes=3, genres=4, studios=4, length=9), 0)
    return build(folder / "interactions.parquet", folder / "items.parquet", folder / "data", split="time", window=8)


@pytest.fixture
def validation(world: Dataset) -> Validation:
    return Validation.of(world, exclude_history=True)


def fitted(name: str, world: Dataset, **changes):
    return families()[name].fit(world, world.split("train"), {**PARAMETERS[name], **changes}, 0)


def taken(world: Dataset) -> np.ndarray:
    """Users by items of what train holds, 0 or 1."""
    rows = held_rows(world)
    owner = np.repeat(np.arange(len(world.user_ids)), np.diff(world.offsets))[rows]
    result = np.zeros((len(world.user_ids), len(world.catalog)))
    result[owner, world.items[rows]] = 1
    return result


def test_every_name_of_the_config_has_a_family():
    assert tuple(families()) == BASELINES == tuple(PARAMETERS)


@pytest.mark.parametrize("name", BASELINES)
def test_scores_are_finite_for_new_users_and_survive_the_disk(name, world):
    model, test = fitted(name, world), world.split("test")[:40]
    scores = model.scores(world, test)
    assert scores.shape == (40, len(world.catalog))
    assert np.isfinite(scores).all()
    again = families()[name].restore(world, model.arrays(), PARAMETERS[name])
    assert np.array_equal(again.scores(world, test), scores)


def test_popularity_counts_what_train_holds(world):
    counts = fitted("popularity", world).scores(world, world.split("test")[:1])[0]
    assert counts.sum() == len(held_rows(world))
    assert counts[3] == (world.items[held_rows(world)] == 3).sum()


def test_recent_popularity_halves_with_every_half_life(world):
    rows = held_rows(world)
    age = world.timestamps[rows].max() - world.timestamps[rows]
    weights = Popularity.fit(world, rows, 30 * DAY).weights
    assert weights[5] == pytest.approx(sum(0.5 ** (age[world.items[rows] == 5] / (30 * DAY))))
    assert Popularity.fit(world, rows[:0], DAY).weights.tolist() == [0.0] * len(world.catalog)


def test_itemknn_is_the_shrunken_cosine_of_the_nearest(world):
    x = taken(world)
    common, norm = x.T @ x, np.sqrt(np.outer(x.sum(0), x.sum(0)))
    cosine = common / (norm + 2.0)
    np.fill_diagonal(cosine, 0)
    sample = world.split("test")[7]
    history = np.unique(world.seen(sample))
    expected = np.zeros(len(world.catalog))
    for item, row in enumerate(cosine):
        nearest = np.lexsort((np.arange(len(row)), -row))[:7]
        expected[item] = row[np.intersect1d(nearest, history)].sum()
    assert np.allclose(fitted("itemknn", world).scores(world, [sample])[0], expected, atol=1e-6)


def test_ease_solves_its_regression(world):
    x = taken(world)
    inverse = np.linalg.inv(x.T @ x + 30.0 * np.eye(x.shape[1]))
    weights = np.eye(x.shape[1]) - inverse / np.diag(inverse)
    assert np.allclose(fitted("ease", world).matrix, weights, atol=1e-5)
    assert (np.diag(fitted("ease", world).matrix) == 0).all()


def test_rules_weigh_pairs_by_distance_and_history_by_age(world):
    counts = np.zeros((len(world.catalog), len(world.catalog)))
    rows = held_rows(world)
    owner = np.repeat(np.arange(len(world.user_ids)), np.diff(world.offsets))
    for first in rows:
        for lag in (1, 2, 3):
            second = first + lag
            if second in rows and owner[first] == owner[second]:
                counts[world.items[first], world.items[second]] += 1 - (lag - 1) / 3
    rules = counts / (counts.sum(axis=1, keepdims=True) + 5.0)
    sample = next(s for s in world.split("test") if len(world.seen(s)) >= 3)
    newest = world.seen(sample)[-3:][::-1]
    expected = (np.array([3, 2, 1]) / 6) @ rules[newest]
    assert np.allclose(fitted("rules", world).scores(world, [sample])[0], expected, atol=1e-6)


def test_text_neighbours_may_include_the_item_itself(world):
    sample = world.split("test")[3]
    last = world.seen(sample)[-1]
    without = fitted("text_knn", world, itself=False, recent=1).scores(world, [sample])[0]
    assert without[last] == 0
    assert without.max() > 0
    assert fitted("text_knn", world, recent=1).scores(world, [sample])[0].argmax() == last


def test_the_blend_is_the_weighted_sum_of_its_components(world, validation):
    model = fitted("text_rules", world)
    test = world.split("test")[:20]
    inputs = HeadInputs.of(world, test)
    parts = model.experts.features(inputs)
    expected = sum(weight * parts[name] for name, weight in model.weights.items())
    assert np.allclose(model.scores(world, test), expected, atol=1e-5)


def test_the_blend_beats_each_of_its_components_and_the_baselines_that_tune_one(world, validation):
    """Its search starts from the best component alone, and ranks all items: no more than its candidates."""
    train = world.split("train")
    found = tune(Blend(), world, train, validation)
    experts = Experts.fit(world, held_rows(world))
    alone = [validation.ndcg(TextRules(experts, {name: 1.0})) for name in experts.names]
    alone += [tune(family, world, train, validation).ndcg for family in (Rules(), TextKNN(), Recent())]
    assert found.ndcg > max(alone)


def test_the_reranked_blend_has_the_reranker_that_a_head_would_have(world):
    train, test = world.split("train"), world.split("test")[:20]
    model = families()["text_rules_reranked"].fit(world, train, PARAMETERS["text_rules_reranked"], 3)
    experts = Experts.fit(world, held_rows(world)).stacked(world, train, seed=3)
    inputs = HeadInputs.of(world, test)
    parts = experts.features(inputs)
    expected = 0.5 * parts["rules"] + 0.1 * parts["popularity"] + parts["reranked"]
    assert np.allclose(model.scores(world, test), expected, atol=1e-5)


def test_the_reranked_blend_weighs_the_reranker_alone_and_is_the_blend_where_it_cannot_learn(world, validation):
    family, train = families()["text_rules_reranked"], world.split("train")
    found = tune(family, world, train, validation).parameters["weights"]
    assert found == {"reranked": 1.0, "popularity": HAIR}
    few = train[:3]  # fewer than the parts that it learns from
    assert tune(family, world, few, validation).parameters == tune(Blend(), world, few, validation).parameters


@pytest.mark.parametrize("network", [GRU4Rec(), SASRec()], ids=lambda one: one.name)
def test_networks_follow_their_seed_and_read_the_past_alone(network, world):
    test = world.split("test")[:5]
    parameters = PARAMETERS[network.name]
    scores = [network.fit(world, world.split("train"), parameters, seed).scores(world, test) for seed in (0, 0, 1)]
    assert np.array_equal(scores[0], scores[1])
    assert not np.allclose(scores[0], scores[2])
    model = network.fit(world, world.split("train"), parameters, 0)
    cut = replace(world, items=world.items.copy())
    cut.items[world.sample_row[test]] = 0  # targets
    assert np.array_equal(model.scores(cut, test[:1]), model.scores(world, test[:1]))


@pytest.mark.parametrize("network", [GRU4Rec(), SASRec()], ids=lambda one: one.name)
def test_networks_learn_a_cycle(network, world):
    size = len(world.catalog)
    cycle = replace(world, items=(np.arange(len(world.items)) % size).astype(np.int32))
    *_, (_, model) = network._epochs(cycle, cycle.split("train"), {"dropout": 0.0, "lr": 5e-3}, 0)
    test = cycle.split("test")
    assert (model.scores(cycle, test).argmax(axis=1) == cycle.targets(test)).mean() > 0.95


class Fixed:
    """A candidate with a given place for the target of every sample."""

    name, random = "fixed", False

    def __init__(self, places: list[list[int]]) -> None:
        self.places, self.asked = places, []

    def paths(self, dataset, samples, validation, seed):
        for number, path in enumerate(self.places):
            yield self._path(number, path)

    def _path(self, number, path):
        for step, place in enumerate(path):
            self.asked.append((number, step))
            yield {"path": number, "step": step}, Places(place)


class Places:
    def __init__(self, place: int) -> None:
        self.place = place

    def scores(self, dataset, samples):
        result = np.zeros((len(samples), len(dataset.catalog)))
        result[:, : self.place - 1] = 2  # so many others are better
        targets = dataset.targets(samples)
        result[:, -1] = 0
        result[np.arange(len(samples)), targets] = 1
        return result


def test_tuning_takes_the_first_of_the_best_and_leaves_a_path_that_does_not_improve(world):
    samples = np.array([s for s in world.split("valid") if world.targets([s])[0] > 20])
    validation = Validation(world, samples, exclude_history=False)
    patience = family.PATIENCE
    fixed = Fixed([[4, 3, *[3] * (patience + 2), 1], [2, 2]])
    found = tune(fixed, world, world.split("train"), validation)
    assert found.parameters == {"path": 1, "step": 0}
    assert found.ndcg == pytest.approx(1 / np.log2(3))
    assert [step for path, step in fixed.asked if path == 0] == list(range(2 + patience))
    assert found.tried == len(fixed.asked)


def test_candidates_are_fitted_as_far_from_validation_as_the_last_fit_is_from_test(world):
    train = world.split("train")
    assert np.array_equal(tuning_samples(world, refit=False), train[: len(train) - len(train) // 8])
    assert np.array_equal(tuning_samples(world, refit=True), train)
    left_out = replace(world, manifest={"settings": {"split": "leave-one-out"}})
    assert np.array_equal(tuning_samples(left_out, refit=False), train)


def test_the_store_tunes_and_fits_once(tmp_path, world, monkeypatch):
    told: list[str] = []

    def store() -> BaselineStore:
        return BaselineStore(tmp_path, world, exclude_history=True, refit=False, progress=told.append)

    monkeypatch.setattr(SASRec, "grid", ({"dropout": 0.2, "lr": 3e-3},))
    monkeypatch.setattr("rporec.baselines.next_item_network.EPOCHS", 2)
    first = store().fitted(SASRec(), [0, 1])
    test = world.split("test")[:8]
    assert not np.allclose(first[0].scores(world, test), first[1].scores(world, test))
    assert store().record("sasrec")["tried"] == 2
    told.clear()
    (tmp_path / "sasrec" / "seed_1.safetensors").unlink()
    again = store().fitted(SASRec(), [0, 1])
    assert told == ["sasrec: fitting, seed 1"]
    for old, new in zip(first, again, strict=True):
        assert np.array_equal(old.scores(world, test), new.scores(world, test))


def test_what_processes_train_side_by_side_is_what_one_would_have_trained(tmp_path, world):
    known, seeds = families(), [0, 1]
    wanted = [known[name] for name in ("rules", "sasrec")]
    told: list[str] = []
    stores = [
        BaselineStore(tmp_path / str(number), world, exclude_history=True, refit=True, progress=told.append)
        for number in range(2)
    ]
    stores[0].prepare(wanted, seeds[:1], 2)
    assert {path.name for path in (tmp_path / "0").rglob("*.*")} == {"tuned.json", "seed_0.safetensors"}  # no rules
    stores[0].prepare(wanted, seeds, 2)
    assert told[-2:] == ["networks: tuning", "sasrec: fitted, seed 1"]  # what was tuned is not tuned again
    told.clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        one, other = (store.fitted(known["sasrec"], seeds) for store in stores)
    finally:
        torch.set_num_threads(threads)
    assert told.count("sasrec: tuning") == 1  # the second store's; the first had nothing left to do
    records = [{k: v for k, v in store.record("sasrec").items() if "seconds" not in k} for store in stores]
    assert records[0] == records[1]
    test = world.split("test")[:8]
    for mine, theirs in zip(one, other, strict=True):
        assert np.array_equal(mine.scores(world, test), theirs.scores(world, test))


def test_processes_end_at_once_when_what_waits_for_them_fails(world, validation):
    train, running = world.split("train"), []

    def interrupted() -> None:
        with processes(2, Work(world, train, train, validation)) as pool:
            endless = {"dropout": 0.2, "lr": 1e-3, "epochs": 41}
            running.extend(pool.submit(fit, SASRec(), endless, seed) for seed in range(8))
            while not running[0].running():
                time.sleep(0.01)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not multiprocessing.active_children()
    assert all(one.cancelled() or one.exception() for one in running)


def test_a_refit_learns_from_validation_too(tmp_path, world):
    stores = [BaselineStore(tmp_path / str(refit), world, exclude_history=True, refit=refit) for refit in (False, True)]
    counts = [store.fitted(families()["popularity"], [0])[0].weights.sum() for store in stores]
    assert counts == [len(held_rows(world)), len(held_rows(world, ("train", "valid")))]


def test_ease_is_left_out_of_large_catalogues(tmp_path, world, monkeypatch):
    monkeypatch.setattr("rporec.baselines.store.EASE_ITEMS", 10)
    store = BaselineStore(tmp_path, world, exclude_history=True, refit=False)
    assert store.fitted(EASE(), [0]) == []
    assert "left_out" in store.record("ease")
