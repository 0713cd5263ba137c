"""A recommender ranks as its head scores, whatever the size of the catalogue, and takes newcomers in."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from test_experts import dataset
from test_rechead import KINDS, config

from rporec.config import ConfigError
from rporec.data import Catalog, Dataset
from rporec.models import item_index, recommender
from rporec.models.experts import Experts
from rporec.models.head_inputs import HeadInputs
from rporec.models.item_index import ApproximateIndex, Found, top_k
from rporec.models.rechead import RecHead
from rporec.models.recommender import Recommender

ITEMS = 900
NOTHING = np.zeros(0, np.int64)


def world(items: int = ITEMS) -> Dataset:
    rng = np.random.default_rng(0)
    titles = [f"name{n} series{n // 5} genre{n % 7}" for n in range(items)]
    return dataset({f"u{n}": rng.zipf(1.3, 30).clip(max=items).tolist() for n in range(40)}, [*titles, ""])


def head_of(data: Dataset, fusion: str = "residual", history: str = "sequence", *, experts: bool = True) -> RecHead:
    fitted = Experts.fit(data, np.arange(len(data.items))) if experts else None
    head = RecHead(data.catalog, config(fusion, history), window=6, seed=3, experts=fitted)
    head.known[: ITEMS // 2] = True
    head.weights = {name: 0.5 + n for n, name in enumerate(fitted.names)} if fitted else {}
    head.weights |= {"history": 0.7, "text": 1.3, "fused": 1.1}
    if history == "sequence":
        head.item_bias.data.normal_(0, 0.5, generator=torch.Generator().manual_seed(4))
    if fusion == "residual":
        head.text_scale.data.fill_(1.0)
    return head.freeze()


def asked(rows: int, items: int = ITEMS, seed: int = 1) -> HeadInputs:
    rng = np.random.default_rng(seed)
    named = rng.integers(items, size=rows)
    return HeadInputs(
        [rng.integers(items, size=n % 9) for n in range(rows)],
        np.full(rows, 10**9),
        ["wants more of the same"] * rows,
        [f"name{n} series{n // 5}" for n in named],
        (np.arange(rows) % 4 > 0).astype(np.float32),
    )


def whole(model: Recommender, inputs: HeadInputs, k: int, exclude: list, allowed: list) -> list[Found]:
    """The slow and plain way."""
    result = []
    for row, scores in enumerate(model.head.scores(inputs).numpy()):
        gone = np.zeros(len(scores), dtype=bool) if allowed[row] is None else ~allowed[row]
        gone[exclude[row]] = True
        order = [int(item) for item in np.argsort(-scores, kind="stable") if not gone[item]][:k]
        result.append((np.array(order), scores[order]))
    return result


@pytest.mark.parametrize(("fusion", "history"), KINDS)
def test_a_small_catalogue_is_ranked_by_the_heads_scores(fusion: str, history: str) -> None:
    model = Recommender(head_of(world(), fusion, history, experts=fusion == "residual"))
    inputs, rng = asked(12), np.random.default_rng(2)
    exclude = [np.repeat(seen, 2) for seen in inputs.seen]
    allowed = [rng.random(ITEMS + 1) < 0.02 if row % 2 else None for row in range(12)]
    expected = whole(model, inputs, 30, exclude, allowed)
    assert {len(items) for items, _ in expected} > {30}  # some filters leave fewer
    for (items, scores), (best, values) in zip(
        model.recommend(inputs, [30] * 12, exclude, allowed), expected, strict=True
    ):
        assert items.tolist() == best.tolist()
        assert scores.tolist() == values.tolist()
        assert scores.dtype == np.float32


@pytest.mark.parametrize("experts", [True, False])
@pytest.mark.parametrize(("fusion", "history"), KINDS)
def test_a_large_catalogue_is_ranked_alike_where_the_candidates_hold_the_best(
    fusion: str, history: str, experts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(item_index, "VISITED", 0.4)
    monkeypatch.setattr(item_index, "exact", None)  # the index must not save itself
    monkeypatch.setattr(recommender, "CANDIDATES", 20)
    monkeypatch.setattr(recommender, "POPULAR", 30)
    model = Recommender(head_of(world(), fusion, history, experts=experts), exact_below=1)
    candidates: list[np.ndarray] = []
    choose = model._candidates
    monkeypatch.setattr(model, "_candidates", lambda *row: candidates.append(choose(*row)) or candidates[-1])
    inputs, rng = asked(40), np.random.default_rng(2)
    exclude = [seen[:2] for seen in inputs.seen]
    allowed = [rng.random(ITEMS + 1) < 0.6 if row % 2 else None for row in range(40)]
    found = model.recommend(inputs, [10] * 40, exclude, allowed)
    alike = 0
    for row, expected in enumerate(whole(model, inputs, 10, exclude, allowed)):
        items, scores = found[row]
        gone = ~allowed[row] if allowed[row] is not None else np.zeros(ITEMS + 1, dtype=bool)
        assert not gone[items].any()
        assert not np.isin(items, exclude[row]).any()
        assert len(items) == 10
        exact = model.head.scores(inputs.take([row])).numpy()[0]
        assert np.allclose(scores, exact[items], atol=1e-4)  # candidates have the head's own scores
        if np.isin(expected[0], candidates[row] if experts else items).all():
            alike += 1
            assert np.allclose(scores, expected[1], atol=1e-4)
    assert alike >= 10  # without training, no cluster holds what belongs together


def test_candidates_of_experts_come_in_where_the_networks_do_not_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recommender, "CANDIDATES", 20)
    monkeypatch.setattr(recommender, "POPULAR", 10)
    head = head_of(world())
    head.weights = {"history": 1e-3, "text": 0.0, "rules": 1.0, "text_knn": 0.7, "popularity": 0.5}
    model = Recommender(head, exact_below=1)
    inputs = asked(20)
    nothing = [NOTHING] * 20
    found = model.recommend(inputs, [10] * 20, nothing, [None] * 20)
    for (items, _), (best, _) in zip(found, whole(model, inputs, 10, nothing, [None] * 20), strict=True):
        assert items.tolist() == best.tolist()


def with_items(catalog: Catalog, *titles: str) -> Catalog:
    ids = [f"new{len(catalog) + n}" for n in range(len(titles))]
    return Catalog(pa.concat_tables([catalog.table, pa.table({"item_id": ids, "title": list(titles)})]))


@pytest.mark.parametrize("exact_below", [10**6, 1])
def test_a_newcomer_ranks_high_when_an_answer_names_it(exact_below: int) -> None:
    old = Recommender(head_of(world()), exact_below=exact_below)
    old.head.text_scale.data.fill_(3.0)
    new = old.grown(with_items(old.catalog, "name3 genre6 name700 series11", "other"))
    assert len(old.catalog) == ITEMS + 1
    assert new.catalog.ids[ITEMS + 1] == "new901"
    inputs = replace(asked(3), answer=["name700 name3 series11 genre6"] * 3, format=np.ones(3, np.float32))
    for items, _ in new.recommend(inputs, [5] * 3, [NOTHING] * 3, [None] * 3):
        assert ITEMS + 1 in items
    if exact_below == 1:
        assert isinstance(new.index, ApproximateIndex)
        assert new.index.cells is old.index.cells


@pytest.mark.parametrize(("fusion", "history"), KINDS)
def test_growing_is_with_catalog_done_once_or_step_by_step(fusion: str, history: str) -> None:
    head = head_of(world(), fusion, history, experts=fusion == "residual")
    titles = ["name1 series0 unheard", "genre3 unheard", ""]
    at_once = Recommender(head).grown(with_items(head.catalog, *titles))
    stepwise = Recommender(head)
    for title in titles:
        stepwise = stepwise.grown(with_items(stepwise.catalog, title))
    thawed = head_of(world(), fusion, history, experts=fusion == "residual")
    thawed._frozen_items = None
    inputs = asked(8)
    expected = thawed.with_catalog(at_once.catalog).scores(inputs)
    for model in (at_once, stepwise):
        assert np.allclose(model.head.scores(inputs), expected, atol=1e-4)


def test_old_items_keep_their_scores_but_for_the_newcomers_neighbours() -> None:
    old = head_of(world())
    new = old.with_catalog(with_items(old.catalog, "name1 series0", *["unlike"] * 300))
    size = len(old.catalog)
    inputs = asked(30, items=12)  # which rules and popularity know
    assert np.allclose(old.scores(inputs), new.scores(inputs)[:, :size], atol=1e-4)
    neighbours = new.experts.neighbours.toarray()
    assert np.array_equal(neighbours[:size, :size], old.experts.neighbours.toarray())
    newcomer = neighbours[size, :size]
    assert top_k(newcomer, 1).tolist() == [1]
    assert np.array_equal(newcomer, neighbours[:size, size])  # all have room for one more
    assert newcomer[1] > newcomer[0] > newcomer[7] == 0


def test_growing_refuses_a_catalogue_whose_items_moved() -> None:
    model = Recommender(head_of(world()))
    turned = Catalog(model.catalog.table.take(pa.array([*range(1, ITEMS + 1), 0])))
    with pytest.raises(ConfigError, match="does not begin with"):
        model.grown(turned)
