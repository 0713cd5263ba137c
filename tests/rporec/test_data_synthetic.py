"""The embedded world keeps its promises: reproducible, readable by `build`, with a true ceiling worth reaching."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from rporec.config import SyntheticConfig
from rporec.data import DataError, Dataset, World, build, find_sources, generate, write_synthetic
from rporec.data.world import Walk

CONFIG = SyntheticConfig(users=250, series=30, volumes=6, genres=6, studios=8, length=14)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    folder = tmp_path_factory.mktemp("synthetic")
    write_synthetic(folder / "raw", CONFIG, seed=0)
    return build(*find_sources(folder / "raw"), folder / "built")


def ndcg(dataset: Dataset, samples: np.ndarray, scores: np.ndarray) -> float:
    gains = []
    for sample, row, target in zip(samples, scores, dataset.targets(samples), strict=True):
        others = np.delete(np.arange(len(row)), np.append(dataset.seen(sample), target))
        rank = 1 + (row[others] > row[target]).sum() + 0.5 * (row[others] == row[target]).sum()
        gains.append(1 / np.log2(rank + 1) if rank <= 10 else 0.0)
    return float(np.mean(gains))


def test_the_same_seed_gives_the_same_world_and_another_seed_another():
    (items, rows, _), (same_items, same_rows, _) = generate(CONFIG, 3), generate(CONFIG, 3)
    assert items.equals(same_items)
    assert rows.equals(same_rows)
    assert not rows.equals(generate(CONFIG, 4)[1])


def test_titles_are_distinct_and_say_series_and_volume(dataset):
    titles = [dataset.catalog.title(item) for item in range(len(dataset.catalog))]
    assert len(set(titles)) == len(titles) == 180
    assert {title.split()[1] for title in titles} == set("123456")
    assert dataset.catalog.text_columns == ["title", "genre", "studio"]


def test_nobody_takes_an_item_twice_or_before_its_release(dataset):
    released = dataset.catalog.table.column("released").to_numpy()
    assert (dataset.timestamps >= released[dataset.items]).mean() > 0.99  # the rest: nothing else was left to take
    for user in range(len(dataset.user_ids)):
        items = dataset.items[dataset.offsets[user] : dataset.offsets[user + 1]]
        assert len(set(items)) == len(items)


def test_some_items_to_predict_are_newer_than_the_training_data(dataset):
    known = dataset.items[dataset.timestamps <= dataset.times(dataset.split("train"))[-1]]
    cold = ~np.isin(dataset.targets(dataset.split("test")), known)
    assert 0.05 < cold.mean() < 0.35


def test_the_oracle_is_a_distribution_and_its_world_survives_json(dataset):
    world = World.load(dataset.root)  # `build` takes world.json along
    samples = dataset.split("test")[:20]
    scores = world.oracle_scores(dataset, samples)
    assert scores.shape == (20, len(dataset.catalog))
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores.sum(1), 1, rtol=1e-5)
    here = np.array([world.item_ids.index(item_id) for item_id in dataset.catalog.ids])
    for sample, row in zip(samples[:5], scores, strict=False):
        start, end = dataset.offsets[dataset.sample_user[sample]], dataset.sample_row[sample]
        walk = Walk(world)  # each user's own, where `oracle_scores` walks on
        for item, time in zip(here[dataset.seen(sample)], dataset.timestamps[start:end], strict=True):
            walk.observe(int(item), int(time))
        one = walk.distribution(int(dataset.times([sample])[0]))
        np.testing.assert_allclose(one[here], row, rtol=1e-5)
        assert one[here[dataset.seen(sample)]].max() == 0


def test_the_oracle_is_calibrated(dataset):
    """A true distribution gives its top item the probability with which that item comes."""
    samples = np.arange(len(dataset.sample_row))
    scores = World.load(dataset.root).oracle_scores(dataset, samples)
    top = scores.argmax(1)
    assert abs((top == dataset.targets(samples)).mean() - scores.max(1).mean()) < 0.03


def test_the_oracle_is_far_above_transition_rules_and_needs_the_run_length(dataset, monkeypatch):
    world = World.load(dataset.root)
    train, test = dataset.split("train"), dataset.split("test")
    follows = np.full((len(dataset.catalog),) * 2, 1e-6)
    np.add.at(follows, (dataset.items[dataset.sample_row[train] - 1], dataset.targets(train)), 1.0)
    rules = ndcg(dataset, test, follows[dataset.items[dataset.sample_row[test] - 1]])
    oracle = ndcg(dataset, test, world.oracle_scores(dataset, test))
    assert 0.6 < oracle < 0.9
    assert oracle > rules + 0.2

    advance = Walk.advance

    def forget_run(self: Walk, item: int) -> None:
        advance(self, item)
        self.run = 1

    monkeypatch.setattr(Walk, "advance", forget_run)
    assert ndcg(dataset, test, world.oracle_scores(dataset, test)) < oracle - 0.02


def test_three_of_a_genre_tire(dataset):
    genre = np.array([dataset.catalog.value("genre", item) for item in range(len(dataset.catalog))])
    stays: dict[int, list[bool]] = {1: [], 3: []}
    for user in range(len(dataset.user_ids)):
        taken = genre[dataset.items[dataset.offsets[user] : dataset.offsets[user + 1]]]
        run = 1
        for now, then in itertools.pairwise(taken):
            if run in stays:
                stays[run].append(now == then)
            run = run + 1 if now == then else 1
    assert np.mean(stays[1]) > 0.6
    assert np.mean(stays[3]) < 0.3


def test_a_catalogue_of_another_world_is_refused(dataset, tmp_path):
    world = World.load(dataset.root)
    world.item_ids[0] = "other"
    with pytest.raises(DataError, match="not of this world"):
        world.oracle_scores(dataset, dataset.split("test")[:1])
    with pytest.raises(DataError, match="only synthetic data have a world"):
        World.load(tmp_path)
    (tmp_path / "world.json").write_text(json.dumps({"habits": {}}))
    with pytest.raises(DataError, match="not a world"):
        World.load(tmp_path)


def test_the_smallest_world_works(tmp_path):
    small = SyntheticConfig(users=12, series=4, volumes=2, genres=2, studios=1, length=4)
    write_synthetic(tmp_path / "raw", small, seed=1)
    dataset = build(*find_sources(tmp_path / "raw"), tmp_path / "built")
    scores = World.load(tmp_path / "built").oracle_scores(dataset, dataset.split("test"))
    assert np.isfinite(scores).all()
    with pytest.raises(DataError, match="exists and is not empty"):
        write_synthetic(tmp_path / "raw", small, seed=1)
