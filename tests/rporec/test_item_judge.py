"""The judge of ReRe on rows of the rollout schema."""

import numpy as np
import pyarrow as pa
import pytest

from rporec.config import parse_config
from rporec.data import Catalog
from rporec.engine.types import Generated, Version
from rporec.evaluation.ranking import list_scores, ranks
from rporec.rl.item_judge import ItemJudge
from rporec.rl.rollout_schema import Lease, rollout_batch

NAMES = ["war one", "war two", "love one", "love two", "space one", "space two"]


class Data:
    """Every sample has target 2 and a user who had items 0 and 2."""

    catalog = Catalog(pa.table({"item_id": NAMES, "title": NAMES}))

    def targets(self, samples):
        return np.full(len(samples), 2)

    def seen(self, sample):
        return np.array([0, 2])


def config(**rere):
    return parse_config({"recipe": "rere", "max_staleness": 0, "group_size": 3, "rere": rere})


def group(number, items, scores=None):
    scores = -np.arange(len(items), dtype=np.float32) if scores is None else scores
    found = [
        Generated(np.array([7, item]), np.array([score, 0]), ((Version(0, 0), 0, 2),), "stop", NAMES[item], item)
        for item, score in zip(items, scores, strict=True)
    ]
    return rollout_batch(Lease(number, 10 + number, np.array([1]), 0), found, [[NAMES[item], ""] for item in items])


def column(batch, name):
    return batch.column(name).to_pylist()


def test_groups_come_back_with_their_own_rewards():
    judge = ItemJudge(config(), Data())
    [hit, miss], metas = judge.score([group(4, [5, 2, 0]), group(5, [5, 1, 0])])
    discount = 1 / np.log2([2, 3, 4])
    assert column(hit, "reward_without_entropy") == pytest.approx(
        [-discount[0] / discount.sum(), 1, -discount[2] / discount.sum()]
    )
    assert column(hit, "rank") == [2, 2, 2]
    assert column(miss, "reward_without_entropy") == [0, 0, 0]
    assert [meta.flat for meta in metas] == [False, True]
    assert metas[0].parts["rule"] == pytest.approx(1 / 3)
    assert metas[0].gaming == {"seen_answers": pytest.approx(2 / 3), "distinct_answers": 3}
    assert hit.column("masked").to_pylist() == [False] * 3


def test_semantic_and_collaborative_terms_are_added_by_their_weights():
    scores = np.arange(12.0).reshape(2, 6)
    asked = []

    def recommender(samples):
        asked.append(samples.tolist())
        return scores

    judge = ItemJudge(config(rule=0, ranking=0, semantic=1, collaborative=0.1), Data(), recommender)
    scored, _ = judge.score([group(4, [5, 2, 3]), group(5, [2, 1, 0])])
    assert asked == [[14, 15]]  # all groups of a call together
    assert [part["collaborative"] for part in column(scored[1], "reward_parts")] == [8, 7, 6]
    semantic = [part["semantic"] for part in column(scored[0], "reward_parts")]
    assert semantic[1] == pytest.approx(1)
    assert semantic[2] > semantic[0]  # another love story is nearer than space
    expected = [one + 0.1 * float(scores[0, item]) for one, item in zip(semantic, [5, 2, 3], strict=True)]
    assert column(scored[0], "reward_without_entropy") == pytest.approx(expected)


def test_dynamic_sampling_hands_back_a_group_of_the_configured_size():
    judge = ItemJudge(config(sampling="dynamic"), Data())
    drawn = group(4, [5, 5, 2, 1, 5], scores=[-1.0, -1.0, -4.0, -2.0, -1.0])
    [scored], [meta] = judge.score([drawn])
    assert column(scored, "item") == [5, 1, 2]
    assert meta.lengths == (2, 2, 2)
    assert column(scored, "reward_without_entropy")[2] == 1
    assert column(scored, "logprobs") == [[-1, 0], [-2, 0], [-4, 0]]


def test_validation_ranks_the_beams_and_what_is_in_none_is_a_miss():
    written = [[{"item": item} for item in items] for items in ([1, 2, 5], [2], [5, 4])]
    judged = ItemJudge(config(), Data()).validate(np.arange(3), written)
    # Of six items the third list leaves four without a place: the middle of places 3 to 6.
    assert ranks(list_scores([[1, 2, 5], [2], [5, 4]], 6), np.full(3, 2)).tolist() == [2, 1, 4.5]
    assert judged["hr@10"] == 1
    assert judged["ndcg@10"] == pytest.approx(np.mean(1 / np.log2([3, 2, 5.5])))
