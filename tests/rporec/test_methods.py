"""Rows of the table that are made of several completions of a sample."""

import numpy as np

from rporec.recipes.methods import voted


def test_completions_vote_by_the_mean_of_their_scores():
    samples = np.array([7, 3, 3, 7, 7, 3])
    scores = np.arange(18.0).reshape(6, 3) ** 2
    [vote] = voted("head_vote", samples, lambda rows: scores[rows])
    assert vote.name == "head_vote3"
    assert vote.samples.tolist() == [3, 7]
    expected = np.stack([scores[[1, 2, 5]].mean(axis=0), scores[[0, 3, 4]].mean(axis=0)])
    np.testing.assert_allclose(vote.scores(np.array([1, 0])), expected[[1, 0]])


def test_one_completion_has_no_vote_and_neither_have_unequal_numbers():
    for samples in ([1, 2, 3], [1, 1, 2]):
        assert list(voted("vote", np.array(samples), lambda rows: np.zeros((len(rows), 2)))) == []
