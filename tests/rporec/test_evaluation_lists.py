"""Top lists against sorting, coverage and diversity against loops over pairs."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import scipy.sparse as sp

from rporec.evaluation.lists import TopLists, diversity, top_lists


def test_lists_are_the_best_and_of_equals_the_first():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 6, (50, 30)).astype(np.float32)  # ties everywhere
    exclude = [rng.choice(30, 4, replace=False) for _ in range(50)]
    lists = top_lists(scores, exclude, k=10)
    for row in range(50):
        left = np.setdiff1d(np.arange(30), exclude[row])
        expected = left[np.argsort(-scores[row, left], kind="stable")][:10]
        assert sorted(lists[row]) == sorted(expected)


def test_diversity_is_the_mean_distance_of_pairs():
    rng = np.random.default_rng(1)
    dense = sp.random(20, 12, density=0.4, random_state=2).toarray()
    dense /= np.maximum(np.linalg.norm(dense, axis=1, keepdims=True), 1e-12)
    lists = np.stack([rng.choice(20, 10, replace=False) for _ in range(6)])
    expected = [np.mean([1 - dense[a] @ dense[b] for a, b in combinations(row, 2)]) for row in lists]
    assert diversity(lists, sp.csr_matrix(dense)) == pytest.approx(expected)


def test_coverage_is_that_of_one_draw_not_of_all_together():
    lists = TopLists()
    samples = np.array([0, 1])
    for shift in (0, 10):  # the second draw shows ten other items
        scores = np.zeros((2, 40))
        scores[:, shift : shift + 10] = 1
        lists.add("sampled", samples, scores)
    assert lists.summary(40)["sampled"] == {"coverage@10": pytest.approx(0.25)}


def test_a_catalogue_shorter_than_a_list_is_shown_whole():
    assert top_lists(np.zeros((2, 4))).tolist() == [[0, 1, 2, 3]] * 2
