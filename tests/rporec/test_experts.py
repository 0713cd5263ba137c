"""The experts know what they were fitted on and nothing later."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from rporec.data import Catalog, Dataset
from rporec.data.slices import rows_of
from rporec.models.experts import Experts
from rporec.models.head_inputs import HeadInputs

DAY = 86_400
TITLES = ["red fox", "red fox two", "blue whale", "blue whale two", "green frog", "grey wolf"]
PATHS = {"a": [0, 1, 2], "b": [0, 1, 3], "c": [4, 5, 0, 1], "d": [2, 3]}


def dataset(paths: dict[str, list[int]] = PATHS, titles: list[str] = TITLES) -> Dataset:
    """Every user takes one item a day, all from day 0; all samples are training samples."""
    table = pa.table({"item_id": [f"i{n}" for n in range(len(titles))], "title": titles})
    lengths = [len(path) for path in paths.values()]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    timestamps = np.concatenate([np.arange(n) for n in lengths]).astype(np.int64) * DAY
    owner = np.repeat(np.arange(len(paths)), lengths)
    rows = np.setdiff1d(np.arange(len(owner)), offsets[:-1])
    rows = rows[np.lexsort((owner[rows], timestamps[rows]))]
    return Dataset(
        root=None,
        manifest={},
        catalog=Catalog(table),
        user_ids=list(paths),
        offsets=offsets,
        items=np.concatenate(list(paths.values())).astype(np.int32),
        timestamps=timestamps,
        sample_user=owner[rows].astype(np.int32),
        sample_row=rows.astype(np.int64),
        sample_split=np.ones(len(rows), np.int8),
        window=5,
    )


def asked(*histories: list[int], day: float = 9) -> HeadInputs:
    return HeadInputs.without_text(
        [np.array(h, np.int32) for h in histories], np.full(len(histories), int(day * DAY), np.int64)
    )


@pytest.fixture
def experts() -> Experts:
    data = dataset()
    return Experts.fit(data, np.arange(len(data.items)))


def test_rules_rank_the_usual_successor_first(experts: Experts) -> None:
    rules = experts.features(asked([0], [4]))["rules"]
    assert rules[0].argmax() == 1
    assert rules[1].argmax() == 5


def test_rules_hold_no_pair_across_users(experts: Experts) -> None:
    assert experts.features(asked([1]))["rules"][0, 4] == 0  # user b ends with 3, user c starts with 4


def test_linear_rules_are_probabilities_shrunken_by_support(experts: Experts) -> None:
    # 0 is left for 1 three times, for 2 and 3 once each at distance 2 (weight 0.9); 4 goes on to 5, 0 and 1.
    given = experts.features(asked([0], [4, 0]))["rules_linear"]
    after = {0: np.array([0, 3, 0.9, 0.9, 0, 0]) / (4.8 + 50), 4: np.array([0.9, 0.8, 0, 0, 0, 1]) / (2.7 + 50)}
    assert np.allclose(given[0], after[0], atol=1e-6)
    assert np.allclose(given[1], (1 * after[0] + 0.9 * after[4]) / 1.9, atol=1e-6)


def test_the_newest_item_has_text_neighbours_of_its_own(experts: Experts) -> None:
    inputs = asked([2, 0])
    assert experts.features(inputs)["text_newest"][0].argmax() == 1
    assert not experts.features(inputs)["text_newest"][0, 3]  # a neighbour of 2 alone
    assert experts.features(inputs)["text_knn"][0, 3] > 0


def test_text_neighbours_share_words_and_leave_the_item_itself_out(experts: Experts) -> None:
    neighbours = experts.features(asked([0]))["text_knn"][0]
    assert neighbours.argmax() == 1
    assert neighbours[0] == neighbours[2] == 0


def test_popularity_counts_strictly_before_the_sample(experts: Experts) -> None:
    first_day, second_day = experts.features(asked([0], day=0)), experts.features(asked([0], day=1))
    assert not first_day["popularity"].any()
    assert second_day["popularity"][0, 0] == 1  # two of four first items
    assert second_day["popularity"][0, 1] == 0  # taken on day 1 itself


def test_popularity_prefers_the_recent(experts: Experts) -> None:
    popularity = experts.features(asked([0], day=9))["popularity_fast"][0]
    assert popularity[1] > popularity[4]


def test_popularity_survives_a_decade_of_silence(experts: Experts) -> None:
    late = experts.features(asked([0], day=40_000))
    assert np.allclose(late["popularity_fast"], experts.features(asked([0], day=9))["popularity_fast"])
    assert late["popularity_fast"].max() == 1


def test_features_of_a_row_do_not_depend_on_the_rows_beside_it(experts: Experts) -> None:
    inputs = HeadInputs.concatenate(
        [asked([0, 1], day=2), asked([4], day=1), asked([], day=3), asked([2], day=9)]  # the last: later than all
    )
    together = experts.features(inputs)
    for row in range(4):
        for name, values in experts.features(inputs.take([row])).items():
            assert np.allclose(values[0], together[name][row], atol=1e-6), name


def test_features_are_float32_between_0_and_1(experts: Experts) -> None:
    features = experts.features(asked([0, 1, 1], [5], []))
    assert set(features) == set(experts.names)
    for values in features.values():
        assert values.shape == (3, len(TITLES))
        assert values.dtype == np.float32
        assert values.min() >= 0
        assert values.max() <= 1 + 1e-6


def test_history_indicators(experts: Experts) -> None:
    features = experts.features(asked([0, 4, 2]))
    assert features["in_history"][0].tolist() == [1, 0, 1, 0, 1, 0]
    assert features["last_item"][0].tolist() == [0, 0, 1, 0, 0, 0]


def test_rows_of_ends_each_user_at_its_last_sample() -> None:
    data = dataset()
    early = np.flatnonzero(data.times(np.arange(len(data.sample_row))) == DAY)
    assert rows_of(data, early).tolist() == [0, 1, 3, 4, 6, 7, 10, 11]


def test_nothing_beyond_the_given_rows_is_learned() -> None:
    data = dataset()
    early = Experts.fit(data, rows_of(data, np.array([0])))  # user a, items 0 and 1
    assert early.rules.nnz == 1
    assert early.items.tolist() == [0, 1]


def test_a_catalogue_without_text_has_no_neighbours() -> None:
    data = dataset(titles=[""] * 6)
    experts = Experts.fit(data, np.arange(len(data.items)))
    assert np.isfinite(experts.features(asked([0]))["text_knn"]).all()
