import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rporec.evaluation import ranking
from rporec.evaluation.ranking import hit, ndcg, ranks


def brute_force(scores: np.ndarray, target: int, excluded: set[int]) -> float:
    rank = 1.0
    for item, score in enumerate(scores):
        if item == target or item in excluded:
            continue
        rank += 1.0 if score > scores[target] else 0.5 if score == scores[target] else 0.0
    return rank


@st.composite
def problems(draw):
    rows, items = draw(st.integers(1, 6)), draw(st.integers(1, 7))
    score = st.integers(-2, 2).map(float)  # few values, so that ties are common
    scores = draw(st.lists(st.lists(score, min_size=items, max_size=items), min_size=rows, max_size=rows))
    index = st.integers(0, items - 1)
    targets = draw(st.lists(index, min_size=rows, max_size=rows))
    exclude = draw(st.lists(st.lists(index, max_size=8), min_size=rows, max_size=rows))
    return np.array(scores, dtype=np.float32), np.array(targets), [np.array(e, dtype=np.int32) for e in exclude]


@given(problems(), st.integers(1, 20))
@settings(max_examples=200, deadline=None)
def test_ranks_agree_with_counting_one_item_at_a_time(problem, chunk):
    scores, targets, exclude = problem
    before, ranking.CHUNK_SCORES = ranking.CHUNK_SCORES, chunk
    try:
        everything, masked = ranks(scores, targets), ranks(scores, targets, exclude)
    finally:
        ranking.CHUNK_SCORES = before
    assert everything.tolist() == [brute_force(s, t, set()) for s, t in zip(scores, targets, strict=True)]
    expected = [brute_force(s, t, set(e.tolist())) for s, t, e in zip(scores, targets, exclude, strict=True)]
    assert masked.tolist() == expected


def test_ties_count_half():
    assert ranks(np.zeros((1, 5)), [2]).tolist() == [3.0]  # a constant score lands in the middle
    assert ranks(np.array([[1.0, 1.0, 0.0]]), [0]).tolist() == [1.5]
    assert hit(np.array([10.0, 10.5]), 10).tolist() == [1.0, 0.0]


def test_a_target_in_the_history_stays_in_the_ranking():
    scores = np.array([[3.0, 2.0, 1.0]])
    assert ranks(scores, [1], [np.array([1])]).tolist() == [2.0]
    assert ranks(scores, [1], [np.array([0, 0, 1])]).tolist() == [1.0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_not_finite_is_an_error_and_names_its_row(bad):
    scores = np.zeros((3, 4), dtype=np.float32)
    scores[2, 3] = bad
    with pytest.raises(ValueError, match="row 2"):
        ranks(scores, [0, 0, 0])


@pytest.mark.parametrize(("targets", "exclude"), [([4], None), ([-1], None), ([0], [[4]]), ([0], [[-1]])])
def test_indices_outside_the_catalogue_are_an_error(targets, exclude):
    with pytest.raises(ValueError, match="outside the catalogue"):
        ranks(np.zeros((1, 4)), targets, exclude)


def test_shapes_that_do_not_fit_are_an_error():
    with pytest.raises(ValueError, match="not \\[B, N\\]"):
        ranks(np.zeros((2, 4)), [0])
    with pytest.raises(ValueError, match="1 exclusions for 2"):
        ranks(np.zeros((2, 4)), [0, 0], [[]])


def test_no_samples_give_no_ranks():
    assert ranks(np.zeros((0, 4)), [], []).shape == (0,)


def test_metrics_of_known_ranks():
    at = np.array([1.0, 3.0, 11.0])
    assert hit(at, 10).tolist() == [1.0, 1.0, 0.0]
    assert ndcg(at, 10).tolist() == [1.0, 0.5, 0.0]
    assert ndcg(at)[2] == pytest.approx(1 / np.log2(12))
