"""The reranker joins the experts as one of them, learns only from what comes after them, and survives a file."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from test_experts import dataset

from rporec.config import ConfigError, HeadConfig
from rporec.data import Catalog, Dataset
from rporec.data.slices import rows_of
from rporec.models import reranker
from rporec.models.experts import Experts
from rporec.models.head_inputs import HeadInputs
from rporec.models.rechead import RecHead
from rporec.models.reranker import Reranker, candidates

ITEMS = 30


def in_a_row() -> Dataset:
    """After an item comes the next one of its row, in 7 of 10 cases, else one a little further on."""
    rng = np.random.default_rng(0)
    paths = {}
    for user in range(80):
        path = [int(rng.integers(ITEMS))]
        for _ in range(9):
            path.append((path[-1] + (1 if rng.random() < 0.7 else int(rng.integers(2, 7)))) % ITEMS)
        paths[f"u{user}"] = path
    return dataset(paths, [f"name{n} series{n // 5}" for n in range(ITEMS)])


@pytest.fixture(scope="module")
def data() -> Dataset:
    return in_a_row()


@pytest.fixture(scope="module")
def stacked(data: Dataset) -> Experts:
    samples = np.arange(len(data.sample_row))
    return Experts.fit(data, rows_of(data, samples)).stacked(data, samples)


def asked(data: Dataset, rows: int = 12) -> HeadInputs:
    samples = np.arange(0, len(data.sample_row), len(data.sample_row) // rows)[:rows]
    return HeadInputs.of(data, samples)


def test_candidates_are_what_an_expert_ranks_among_its_best(data: Dataset, stacked: Experts, monkeypatch) -> None:
    monkeypatch.setattr(reranker, "CANDIDATES", 3)
    inputs = asked(data)
    found = candidates(stacked, inputs, stacked.sparse(inputs))
    parts = replace(stacked, reranker=None).features(inputs)
    parts["rules_newest"] = stacked.linear_rules(inputs, reranker.NEAR).toarray()
    parts["successor"] = np.stack([stacked.successors.toarray()[one[-1]] for one in inputs.seen])
    for row in range(len(inputs)):
        wanted = set()
        for name in reranker.RANKED:
            values = parts[name][row]
            wanted |= {item for item in np.flatnonzero(values > 0) if values[item] >= np.sort(values)[-3]}
        assert found.items[found.rows == row].tolist() == sorted(wanted)


def test_ranks_count_what_is_strictly_more_in_the_same_row() -> None:
    rows, values = np.array([0, 0, 0, 0, 2, 2]), np.array([1, 3, 1, 0, 5, 7], np.float32)
    assert np.allclose(np.expm1(reranker._ranks(values, rows)), [1, 0, 1, 3, 1, 0])


def test_it_is_one_expert_more_and_changes_no_other(data: Dataset, stacked: Experts) -> None:
    inputs = asked(data)
    counted = replace(stacked, reranker=None)
    others = counted.features(inputs)
    parts = stacked.features(inputs)
    assert [*others, "reranked"] == list(stacked.names)
    assert all(np.array_equal(value, parts[name]) for name, value in others.items())
    assert np.allclose(parts["reranked"].max(axis=1), 1)
    assert parts["reranked"].min() >= 0
    weights = {"reranked": 2.0, "rules": 0.5, "popularity": 0.25}
    total = sum(np.float32(weight) * parts[name] for name, weight in weights.items())
    assert np.allclose(stacked.weigh(inputs, weights).scores(), total, atol=1e-6)


def test_a_head_weighs_it_in_the_place_of_the_experts_that_it_has_read(data: Dataset, stacked: Experts) -> None:
    config = HeadConfig(fusion="residual", history="sequence", dim=16, layers=1, heads=2)
    head, inputs = RecHead(data.catalog, config, window=4, experts=stacked), asked(data)
    assert set(head.components(inputs)) == {"history", "text", "reranked"}, "what a search gives scalars to"
    head.weights = {"history": 0.0, "text": 0.0, "rules": 2.0}  # of a search that weighed all
    assert np.allclose(head.scores(inputs).numpy(), 2 * stacked.features(inputs, ["rules"])["rules"], atol=1e-6)


def test_what_is_no_candidate_goes_by_popularity_behind_all_that_are(data: Dataset, stacked: Experts) -> None:
    inputs = HeadInputs.without_text([np.array([], np.int32)], np.array([10**9]))
    scores = stacked.weigh(inputs, stacked.whole({"history": 0.0, "reranked": 3.0})).scores()[0]
    parts = {name: values[0] for name, values in stacked.features(inputs).items()}
    beyond = np.flatnonzero(parts["reranked"] == 0)
    assert 0 < len(beyond) < ITEMS
    assert scores[beyond] == pytest.approx(3e-4 * parts["popularity"][beyond])
    assert scores[parts["reranked"] > 0.01].min() > scores[beyond].max()


def test_what_comes_in_alone_is_ranked_as_in_a_batch(data: Dataset, stacked: Experts) -> None:
    inputs = asked(data)
    together = stacked.features(inputs)["reranked"]
    alone = [stacked.features(inputs.take([row]))["reranked"][0] for row in range(len(inputs))]
    assert np.allclose(together, alone, atol=1e-5)


def test_the_same_seed_learns_the_same_and_no_part_sees_its_own_samples(
    data: Dataset, stacked: Experts, monkeypatch
) -> None:
    samples = np.arange(len(data.sample_row))
    counted: list[np.ndarray] = []

    def refitted(self: Experts, dataset: Dataset, rows: np.ndarray) -> Experts:
        counted.append(rows)
        return original(self, dataset, rows)

    original = Experts.refitted
    monkeypatch.setattr(Experts, "refitted", refitted)
    again = Reranker.fit(data, samples, stacked).parameters
    assert all(np.array_equal(value, again[name]) for name, value in stacked.reranker.parameters.items())
    parts = np.array_split(samples, reranker.PARTS)[reranker.FIRST :]
    for rows, part in zip(counted, parts, strict=True):
        assert not set(rows) & set(data.sample_row[part])


def test_it_learns_what_the_experts_show(data: Dataset, stacked: Experts) -> None:
    best = stacked.features(asked(data, 40))["reranked"].argmax(axis=1)
    usual = np.array([(one[-1] + 1) % ITEMS for one in asked(data, 40).seen])
    assert (best == usual).mean() > 0.8


def test_a_file_holds_it(data: Dataset, stacked: Experts) -> None:
    restored = Experts.from_arrays(stacked.arrays(), stacked.half_lives)
    inputs = asked(data)
    assert np.array_equal(restored.features(inputs)["reranked"], stacked.features(inputs)["reranked"])


def test_newcomers_are_candidates_by_their_text_and_move_no_other_where_they_have_none(data, stacked) -> None:
    inputs = asked(data)
    series = int(inputs.seen[0][-1]) // 5
    for title, heard in (("unheard", False), (f"fresh series{series}", True)):
        new = pa.table({"item_id": ["new"], "title": [title]})
        catalog = Catalog(pa.concat_tables([data.catalog.table, new]))
        given = stacked.with_catalog(catalog, np.arange(ITEMS)).features(inputs)["reranked"]
        assert (given[0, ITEMS] > 0) == heard
        if not heard:
            assert np.array_equal(given[:, :ITEMS], stacked.features(inputs)["reranked"])


def test_without_a_target_among_the_candidates_it_says_so() -> None:
    data = dataset({"a": [0, 1], "b": [2, 3]})
    experts = Experts.fit(data, np.arange(len(data.items)))
    with pytest.raises(ConfigError, match=r"head\.reranker: none of 2 samples"):
        Reranker.fit(data, np.arange(2), experts)
