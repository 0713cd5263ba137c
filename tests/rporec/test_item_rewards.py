"""The rewards of generated items against their formulas, written out."""

from math import log2

import numpy as np
import pytest

from rporec.config import ReReConfig, parse_config
from rporec.rl.item_rewards import collaborative, item_rewards, most_diverse, ranking, rule, semantic
from rporec.rl.policies import lr_schedule

ITEMS = np.array([7, 3, 9, 1])


def test_rule_pays_for_the_target_alone():
    assert rule(ITEMS, 9).tolist() == [0, 0, 1, 0]
    assert rule(ITEMS, 8).tolist() == [0, 0, 0, 0]


def test_ranking_charges_a_miss_by_its_place_only_where_the_target_was_found():
    discount = [1 / log2(2), 1 / log2(3), 1 / log2(4), 1 / log2(5)]
    shares = [-one / sum(discount) for one in discount]
    assert ranking(ITEMS, 9) == pytest.approx([shares[0], shares[1], 0, shares[3]])
    assert ranking(ITEMS, 7) == pytest.approx([0, *shares[1:]])
    assert ranking(ITEMS, 8).tolist() == [0, 0, 0, 0]
    assert ranking(ITEMS, 1).argmin() == 0  # the hardest negative is the best-ranked miss


def test_semantic_is_the_cosine_with_the_target():
    vectors = np.zeros((10, 2), np.float32)
    vectors[[9, 7, 3]] = [[2, 0], [3, 3], [-5, 0]]  # item 1 has no text
    assert semantic(ITEMS, 9, vectors) == pytest.approx([0.5**0.5, -1, 1, 0])
    assert semantic(ITEMS, 1, vectors).tolist() == [0, 0, 0, 0]


def test_collaborative_is_the_recommenders_own_score():
    assert collaborative(ITEMS, np.arange(10) / 4).tolist() == [1.75, 0.75, 2.25, 0.25]


def test_the_reward_is_the_weighted_sum_of_the_terms_that_are_there():
    vectors, scores = np.eye(10), np.arange(10.0)
    reward, parts = item_rewards(ITEMS, 9, ReReConfig())
    assert set(parts) == {"rule", "ranking"}
    np.testing.assert_allclose(reward, rule(ITEMS, 9) + ranking(ITEMS, 9))
    weights = ReReConfig(rule=0.5, ranking=0, semantic=2, collaborative=0.1)
    reward, parts = item_rewards(ITEMS, 9, weights, vectors, scores)
    np.testing.assert_allclose(reward, [0.7, 0.3, 0.5 + 2 + 0.9, 0.1], rtol=1e-6)
    assert set(parts) == {"rule", "ranking", "semantic", "collaborative"}


def test_dynamic_sampling_keeps_hits_then_misses_that_repeat_least():
    drawn = np.array([5, 5, 2, 9, 2, 5, 9, 4, 1])
    score = np.array([-1.0, -1.0, -3.0, -2.0, -3.0, -1.0, -2.0, -5.0, -4.0])
    kept = most_diverse(drawn, 9, score, 6)
    assert drawn[kept].tolist() == [5, 9, 9, 2, 1, 4]  # both hits, each miss once, best score first
    kept = most_diverse(drawn, 9, score, 8)
    assert drawn[kept].tolist() == [5, 5, 9, 9, 2, 2, 1, 4]
    assert most_diverse(drawn, 9, score, 100).tolist() == sorted(range(9), key=lambda at: (-score[at], at))
    assert drawn[most_diverse(drawn, 8, score, 3)].tolist() == [5, 9, 2]


def test_the_learning_rate_rises_and_then_falls_along_a_cosine():
    factor = lr_schedule(parse_config({"steps": 22, "rl": {"warmup_steps": 2, "schedule": "cosine"}}))
    assert [factor(step) for step in (0, 1, 2, 12, 22, 30)] == pytest.approx([0.5, 1, 1, 0.5, 0, 0], abs=1e-12)
    flat = lr_schedule(parse_config({"steps": 22, "rl": {"warmup_steps": 2}}))
    assert [flat(step) for step in (0, 1, 2, 21)] == [0.5, 1, 1, 1]
    assert lr_schedule(parse_config({})) is None
