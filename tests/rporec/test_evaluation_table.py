import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from rporec.data import Catalog, Dataset
from rporec.data.slices import held_rows
from rporec.evaluation.bootstrap import bootstrap_mean
from rporec.evaluation.cold import cold_items, popularity_strata
from rporec.evaluation.ranking import hit, ndcg
from rporec.evaluation.table import DEFAULT_PAIRS, METRICS, RankTable, metrics
from rporec.evaluation.terminal import print_table
from rporec.files import write_json


@pytest.fixture
def world() -> Dataset:
    """Three users over six items."""
    return Dataset(
        root=None,
        manifest={},
        catalog=Catalog(pa.table({"item_id": [f"i{n}" for n in range(6)]})),
        user_ids=["ann", "bob", "cy"],
        offsets=np.array([0, 4, 7, 9]),
        items=np.array([0, 1, 2, 3, 1, 2, 4, 0, 5], np.int32),
        timestamps=np.arange(9),
        sample_user=np.array([0, 0, 1, 0, 1, 2], np.int32),
        sample_row=np.array([1, 2, 5, 3, 6, 8]),
        sample_split=np.array([1, 1, 1, 3, 3, 3], np.int8),
        window=5,
    )


def test_both_conventions_come_from_the_same_scores(world):
    table = RankTable()
    scores = np.tile(np.array([6.0, 5.0, 4.0, 3.0, 2.0, 1.0]), (3, 1))
    table.add_scores(world, "popularity", world.split("test"), scores)
    rows = {(r["convention"], r["sample"]): r for r in table.table.to_pylist()}
    assert rows["all", 3] == {
        "method": "popularity",
        "convention": "all",
        "user_id": "ann",
        "sample": 3,
        "target": "i3",
        "rank": 4.0,
    }
    assert rows["exclude_history", 3]["rank"] == 1.0  # ann has seen i0, i1, i2
    assert rows["exclude_history", 5]["rank"] == 5.0  # cy has seen i0 alone


def test_several_completions_of_a_sample_are_averaged_as_metrics_and_not_as_ranks(world):
    table = RankTable()
    samples = world.split("test")
    for at in ([1.0, 2.0, 3.0], [20.0, 2.0, 3.0]):
        table.add(world, "rporec_stage2_sampled", "all", samples, np.array(at))
    entry = metrics(table, {}, "test", [0], "all")["conventions"]["all"]["methods"]["rporec_stage2_sampled"]
    assert entry["samples"] == 3
    assert entry["hr@10"] == pytest.approx((0.5 + 1 + 1) / 3)
    assert entry["ndcg@10"] == pytest.approx((0.5 + ndcg(np.array([2.0, 3.0])).sum()) / 3)


def test_metrics_can_be_recomputed_from_the_file(world, tmp_path):
    rng = np.random.default_rng(0)
    table = RankTable()
    for method in ("rporec_stage1", "rporec_stage2", "own_method"):
        table.add_scores(world, method, world.split("test"), rng.normal(size=(3, 6)))
    table.write(tmp_path / "ranks.parquet")
    assert [p.name for p in tmp_path.iterdir()] == ["ranks.parquet"]  # no temporary file is left
    summary = metrics(RankTable.read(tmp_path / "ranks.parquet"), {"name": "w"}, "test", [0], "exclude_history")
    assert summary == metrics(table, {"name": "w"}, "test", [0], "exclude_history")
    part = summary["conventions"]["all"]
    assert list(part["methods"]) == ["rporec_stage1", "rporec_stage2", "own_method"]
    frame = pq.read_table(tmp_path / "ranks.parquet").to_pylist()
    for method, entry in part["methods"].items():
        at = np.array([r["rank"] for r in frame if r["method"] == method and r["convention"] == "all"])
        users = np.array([r["user_id"] for r in frame if r["method"] == method and r["convention"] == "all"])
        assert entry["hr@3"] == pytest.approx(hit(at, 3).mean())
        assert entry["ndcg@5"] == pytest.approx(ndcg(at, 5).mean())
        interval = bootstrap_mean(ndcg(at, 10), users)
        assert entry["ndcg@10_ci"] == pytest.approx([interval.low[0], interval.high[0]])
        assert set(entry) == {"samples", *METRICS, *(f"{m}_ci" for m in METRICS)}


def test_pairs_hold_the_methods_that_are_there_on_the_samples_that_both_have(world):
    table, test = RankTable(), world.split("test")
    table.add(world, "rporec_stage1", "all", test, np.array([2.0, 3.0, 4.0]))
    table.add(world, "rporec_stage2", "all", test[:2], np.array([1.0, 1.0]))
    paired = metrics(table, {}, "test", [0], "all")["conventions"]["all"]["paired"]
    assert list(paired) == ["rporec_stage2-rporec_stage1"]
    entry = paired["rporec_stage2-rporec_stage1"]
    assert entry["ndcg@10"] == pytest.approx((2 - ndcg(np.array([2.0, 3.0])).sum()) / 2)
    assert entry["ci"][0] <= entry["ndcg@10"] <= entry["ci"][1]
    assert entry["hr@10"] == 0.0
    assert entry["hr@10_ci"] == [0.0, 0.0]


def test_targets_that_training_never_showed_have_a_table_of_their_own(world):
    assert held_rows(world).tolist() == [0, 1, 2, 4, 5]  # cy's first item belongs to no train sample
    cold = cold_items(world)
    assert cold == {"i3", "i4", "i5"}
    table = RankTable()
    table.add(world, "ease", "all", world.split("test"), np.array([1.0, 1.0, 3.0]))
    part = metrics(table, {}, "test", [0], "all", cold={"i5"})["conventions"]["all"]
    assert part["samples"] == 3
    assert part["cold"]["samples"] == 1
    assert part["cold"]["methods"]["ease"]["ndcg@10"] == 0.5
    assert metrics(table, {}, "test", [0], "all", cold=())["conventions"]["all"]["cold"]["methods"] == {}


def test_strata_hold_a_fifth_of_what_train_shows_at_either_end(world):
    items = np.array([3, 1, 3, 3, 1, 0, 3, 2, 1, 3, 4], dtype=np.int32)  # 4 alone comes after train's last sample
    world = replace(
        world,
        user_ids=["ann"],
        offsets=np.array([0, 11]),
        items=items,
        timestamps=np.arange(11),
        sample_row=np.array([9, 10]),
        sample_user=np.array([0, 0], np.int32),
        sample_split=np.array([1, 3], np.int8),
    )
    # Shares of train: 3 has .5, 1 has .3, the others .1 each; an item belongs where its share begins.
    assert popularity_strata(world) == {"head": {"i3"}, "middle": {"i1"}, "tail": {"i0", "i2"}}
    assert popularity_strata(world, share=0.5) == {"head": {"i3"}, "middle": set(), "tail": {"i0", "i1", "i2"}}


@pytest.mark.parametrize("bad", [np.nan, 0.5, np.inf])
def test_a_rank_that_is_none_is_refused(world, bad):
    with pytest.raises(ValueError, match="ease: a rank is"):
        RankTable().add(world, "ease", "all", np.array([3]), np.array([bad]))


def test_a_pair_is_named_unambiguously():
    assert not any("-" in name for pair in DEFAULT_PAIRS for name in pair)


def test_the_printed_table_shows_intervals_and_differences(world, tmp_path):
    table, test = RankTable(), world.split("test")
    table.add(world, "rporec_stage1", "all", test, np.array([2.0, 3.0, 4.0]))
    table.add(world, "rporec_stage2", "all", test, np.array([1.0, 1.0, 1.0]))
    summary = metrics(table, {}, "test", [0], "all", cold={"i5"})
    write_json(tmp_path / "metrics.json", summary)
    console = Console(record=True, width=120, file=open("/dev/null", "w"))  # noqa: SIM115
    print_table(json.loads((tmp_path / "metrics.json").read_text()), console)
    text = console.export_text()
    assert "1.000 [1.000, 1.000]" in text
    assert "+0.479 [+0.369, +0.569]" in text
    assert "targets that training never showed: rporec_stage1 0.431" in text
    print_table(summary | {"headline": "exclude_history"}, console)
    assert "No ranks in the convention exclude_history" in console.export_text()
