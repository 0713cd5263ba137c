"""What an index finds is permitted, complete and best first, whatever is filtered away."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from rporec.models import item_index as module
from rporec.models.item_index import ApproximateIndex, ExactIndex, item_index, permitted, top_k

SIZE, DIM = 4000, 16


def world(seed: int = 0, size: int = SIZE, queries: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """Vectors and queries from the same 20 clusters."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(20, DIM)) * 2
    points = centres[rng.integers(20, size=size + queries)] + rng.normal(size=(size + queries, DIM))
    return points[:size].astype(np.float32), points[size:].astype(np.float32)


def brute(vectors: np.ndarray, query: np.ndarray, k: int, mask: np.ndarray | None) -> list[int]:
    scores = vectors @ query
    order = np.lexsort((np.arange(len(scores)), -scores))
    return [int(item) for item in order if mask is None or mask[item]][:k]


@pytest.fixture(scope="module")
def approximate() -> ApproximateIndex:
    return ApproximateIndex.build(world()[0])


@pytest.mark.parametrize("kind", ["exact", "approximate"])
@pytest.mark.parametrize("share", [1.0, 0.3, 0.01, 0.001, 0.0])
def test_only_permitted_items_and_as_many_as_there_are(kind: str, share: float, approximate: ApproximateIndex) -> None:
    vectors, queries = world()
    index = ExactIndex(vectors) if kind == "exact" else approximate
    rng = np.random.default_rng(1)
    for query in queries:
        allowed = rng.random(SIZE) < share
        excluded = np.array(brute(vectors, query, 30, None) * 2)
        mask = permitted(SIZE, allowed, excluded)
        items, scores = index.search(query, 25, mask)
        assert len(items) == len(set(items.tolist())) == min(25, mask.sum())
        assert mask[items].all()
        assert (np.diff(scores) <= 0).all()
        assert np.allclose(scores, vectors[items] @ query, rtol=1e-5)
        if kind == "exact" or share <= 0.01:  # so few are read one and all
            assert items.tolist() == brute(vectors, query, 25, mask)


def test_the_cells_themselves_respect_filters(approximate: ApproximateIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "VISITED", 0.3)
    monkeypatch.setattr(module, "exact", None)  # no way round them
    vectors, queries = world()
    allowed = np.random.default_rng(2).random(SIZE) < 0.3
    for query in queries:
        excluded = np.array(brute(vectors, query, 5, None))
        mask = permitted(SIZE, allowed, excluded)
        items, _ = approximate.search(query, 10, mask)
        expected = brute(vectors, query, 10, mask)
        assert mask[items].all()
        assert len({*items.tolist()} & {*expected}) >= 9


def test_a_filter_that_leaves_nothing_near_the_query_still_fills_the_list(approximate: ApproximateIndex) -> None:
    vectors, queries = world()
    for query in queries[:5]:
        far = np.ones(SIZE, dtype=bool)
        far[brute(vectors, query, SIZE // 2, None)] = False
        assert approximate.search(query, 10, far)[0].tolist() == brute(vectors, query, 10, far)


def test_the_approximation_finds_nearly_all(approximate: ApproximateIndex) -> None:
    vectors, queries = world()
    shares = [len({*approximate.search(q, 10)[0].tolist()} & {*brute(vectors, q, 10, None)}) / 10 for q in queries]
    assert np.mean(shares) > 0.9


def test_whole_catalogue_when_more_is_asked_for_than_there_is(approximate: ApproximateIndex) -> None:
    vectors, queries = world()
    assert approximate.search(queries[0], 2 * SIZE)[0].tolist() == brute(vectors, queries[0], SIZE, None)


def test_newcomers_are_found_and_nothing_is_built(approximate: ApproximateIndex) -> None:
    vectors, queries = world()
    newcomers = np.stack([3 * queries[0], 3 * queries[1]])
    grown = approximate.grown(np.concatenate([vectors, newcomers]))
    assert grown.cells is approximate.cells
    assert grown.search(queries[0], 5)[0][0] == SIZE
    assert SIZE not in grown.search(queries[0], 5, np.arange(SIZE + 2) != SIZE)[0]
    assert approximate.search(queries[0], 5)[0].max() < SIZE


def test_the_same_seed_builds_the_same_index() -> None:
    import faiss

    vectors, _ = world()
    one, two, other = (faiss.serialize_index(ApproximateIndex.build(vectors, seed=seed).cells) for seed in (3, 3, 4))
    assert np.array_equal(one, two)
    assert not np.array_equal(one, other)


def test_faiss_keeps_to_one_thread_in_whichever_thread_asks(approximate: ApproximateIndex) -> None:
    import faiss

    found: list[int] = []

    def ask() -> None:
        faiss.omp_set_num_threads(4)
        approximate.search(world()[1][0], 5)
        found.append(faiss.omp_get_max_threads())

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert found == [1]


def test_the_size_picks_the_index() -> None:
    vectors, _ = world()
    assert isinstance(item_index(vectors), ExactIndex)
    assert isinstance(item_index(vectors, exact_below=SIZE), ApproximateIndex)
    assert isinstance(item_index(vectors, exact_below=SIZE + 1), ExactIndex)


def test_equal_scores_go_by_index_and_minus_infinity_never_counts() -> None:
    scores = np.array([1, 3, -np.inf, 3, 2, 3, 2], dtype=np.float32)
    assert top_k(scores, 2).tolist() == [1, 3]
    assert top_k(scores, 5).tolist() == [1, 3, 5, 4, 6]
    assert top_k(scores, 7).tolist() == [1, 3, 5, 4, 6, 0]
    assert top_k(scores[:0], 3).tolist() == top_k(scores, 0).tolist() == []


def test_a_mask_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(3,\) for a catalogue of 4 items"):
        permitted(4, np.ones(3, dtype=bool), None)


def test_masks_of_the_caller_stay_as_they_are() -> None:
    allowed = np.ones(5, dtype=bool)
    assert permitted(5, allowed, np.array([1, 1])).tolist() == [True, False, True, True, True]
    assert allowed.all()
