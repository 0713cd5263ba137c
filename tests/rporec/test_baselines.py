from dataclasses import dataclass

import numpy as np
import pytest

from rporec.baselines import Baseline, Popularity, RecentPopularity

DAY = 86_400


@dataclass(frozen=True)
class Drift:
    """Twenty users who liked item 0 for long, then item 1; item 1 comes next."""

    users: int = 20

    def __post_init__(self):
        old, new, after = np.zeros((self.users, 8)), np.ones((self.users, 2)), np.full((self.users, 1), 1)
        fill = np.arange(self.users)[:, None] % 5 + 2  # each has one of five other items first
        columns = np.concatenate([fill, old, new, after], axis=1).astype(np.int32)
        put = object.__setattr__
        put(self, "items", columns.ravel())
        put(self, "timestamps", np.tile(np.array([0, *range(1, 9), 96, 98, 101]) * DAY, self.users))
        put(self, "rows", np.flatnonzero(self.timestamps <= 98 * DAY))
        put(self, "valid", np.arange(self.users))
        put(self, "catalog", range(8))

    def targets(self, samples):
        return np.ones(len(samples), dtype=np.int32)

    def seen(self, sample):
        return self.items[sample * 12 : sample * 12 + 11]


def test_popularity_counts_what_it_was_given():
    world = Drift()
    model: Baseline = Popularity.fit(world, world.rows)
    scores = model.scores(world, world.valid[:3])
    assert scores.shape == (3, 8)
    assert scores[0].tolist() == [160, 40, 4, 4, 4, 4, 4, 0]
    assert Popularity.fit(world, world.rows[:0]).counts.sum() == 0


def test_recent_popularity_halves_with_every_half_life():
    world = Drift()
    model = RecentPopularity.fit(world, world.rows, half_life=2 * DAY)
    assert model.scores(world, world.valid[:1])[0, 1] == pytest.approx(20 * (1.0 + 0.5))  # last, and two days before
    assert model.weights[0] < 1e-6


def test_the_half_life_is_picked_on_validation():
    world = Drift()
    best = RecentPopularity.select(world, world.rows, world.valid, exclude_history=False)
    assert best.weights.argmax() == 1
    forgets_nothing = RecentPopularity.select(world, world.rows, world.valid, exclude_history=False, half_lives=[1e9])
    assert forgets_nothing.weights.argmax() == 0


def test_no_interactions_give_a_constant_and_no_error():
    world = Drift()
    model = RecentPopularity.select(world, world.rows[:0], world.valid)
    assert np.isfinite(model.scores(world, world.valid)).all()
    assert model.weights.tolist() == [0.0] * 8
