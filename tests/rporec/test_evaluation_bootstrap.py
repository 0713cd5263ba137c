import numpy as np
import pytest

from rporec.evaluation import bootstrap
from rporec.evaluation.bootstrap import bootstrap_mean


def by_hand(values: np.ndarray, users: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    names = np.unique(users)
    groups = [values[users == name] for name in names]
    draws = [np.concatenate([groups[i] for i in rng.integers(len(names), size=len(names))]) for _ in range(resamples)]
    return np.percentile([d.mean() for d in draws], [2.5, 97.5])


def test_the_interval_is_that_of_a_plain_cluster_bootstrap():
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(40), rng.integers(1, 8, size=40))
    values = rng.normal(size=40)[users] + 0.3 * rng.normal(size=len(users))
    estimate = bootstrap_mean(values, users, resamples=4000)
    assert estimate.value[0] == pytest.approx(values.mean())
    expected = by_hand(values, users, 4000, np.random.default_rng(1))
    assert np.allclose([estimate.low[0], estimate.high[0]], expected, atol=0.03)


def test_users_are_drawn_and_not_samples():
    users = np.repeat(np.arange(30), 20)
    values = np.random.default_rng(0).normal(size=30)[users]  # a user's samples all agree
    clustered = bootstrap_mean(values, users)
    pretended = bootstrap_mean(values, np.arange(len(values)))
    assert (clustered.high - clustered.low)[0] > 3 * (pretended.high - pretended.low)[0]


def test_the_same_seed_gives_the_same_interval_and_chunks_do_not_matter(monkeypatch):
    values, users = np.random.default_rng(0).normal(size=(90, 3)), np.arange(90) // 3
    once, again = bootstrap_mean(values, users, seed=3), bootstrap_mean(values, users, seed=3)
    assert np.array_equal(once.low, again.low)
    assert not np.array_equal(once.low, bootstrap_mean(values, users, seed=4).low)
    monkeypatch.setattr(bootstrap, "CHUNK_WEIGHTS", 100)
    assert np.array_equal(once.low, bootstrap_mean(values, users, seed=3).low)


def test_a_column_is_averaged_over_the_samples_that_it_has():
    values = np.array([[1.0, np.nan], [3.0, 5.0], [np.nan, np.nan]])
    estimate = bootstrap_mean(values, np.array(["a", "b", "c"]))
    assert estimate.value.tolist() == [2.0, 5.0]
    assert estimate.low[1] == estimate.high[1] == 5.0
    empty = bootstrap_mean(np.full((2, 1), np.nan), np.array([0, 1]))
    assert np.isnan([empty.value[0], empty.low[0], empty.high[0]]).all()


def test_labels_that_do_not_fit_are_an_error():
    with pytest.raises(ValueError, match="2 samples and 3 user labels"):
        bootstrap_mean(np.zeros(2), np.arange(3))
